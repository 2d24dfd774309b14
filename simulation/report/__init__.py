"""What a run or a sweep came to, for people: event log → story → tables of protocols → figures → one HTML file."""
