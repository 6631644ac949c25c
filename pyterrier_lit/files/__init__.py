"""Files: reads candidates and teacher data, writes runs, and follows TIRA's conventions."""
