"""Views on the reader: frame pairs for pre-training, action windows for policies, and the loader that orders them."""
