"""What may be asked of lrc, and the errors that answer it. Needs no tensor library."""
