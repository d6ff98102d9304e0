"""Views on the reader: frame pairs, video clips and action windows, and the loader that orders them."""
