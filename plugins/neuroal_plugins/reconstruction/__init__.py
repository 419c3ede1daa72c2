"""What gives the surviving weights new values."""
