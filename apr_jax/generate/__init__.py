"""Text: tokens in and out, compiled programs of the decode loop, sampling."""
