"""Plan how every weight is compressed: from shapes, statistics, or an edited plan file."""
