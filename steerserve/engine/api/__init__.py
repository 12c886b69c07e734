"""What the server, the commands and calibration may know of an engine; imports no torch."""
