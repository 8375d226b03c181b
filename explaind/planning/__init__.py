"""What an attribution will cost, before it is made."""
