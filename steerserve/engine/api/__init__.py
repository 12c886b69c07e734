"""The interface of an engine to the server, the commands and calibration; imports no torch."""
