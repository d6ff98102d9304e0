"""Parts that several models share: patches, positions, transformer blocks, the image encoder, sentence vectors."""
