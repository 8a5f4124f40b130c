"""Instruments: programs that measure batchq or try to break it. See README.md here."""
