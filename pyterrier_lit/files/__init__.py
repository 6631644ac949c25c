"""Files: candidates in, runs out, TIRA's conventions around both."""
