"""Encoders learnt from single pictures: what predicting the future is compared with."""
