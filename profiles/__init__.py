"""Who is this device, and what can it bear?"""
