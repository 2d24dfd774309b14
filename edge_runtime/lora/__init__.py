"""What an adapter is: low-rank pairs by layer, their algebra, and their files. numpy only."""
