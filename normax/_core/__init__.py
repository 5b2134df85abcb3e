"""What all topics share. It is private, and knows no topic."""
