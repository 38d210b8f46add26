"""What a merged model can be scored by."""
