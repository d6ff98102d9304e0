"""`foreframe view OUT`: a data set in the browser, on loopback, read from its shards as they lie."""
