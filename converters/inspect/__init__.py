"""What one checkpoint shows on its own: checks, statistics, the page of HTML."""
