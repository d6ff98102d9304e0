"""What `foreframe serve` is made of: wire format, sessions, a small client, an example robot loop."""
