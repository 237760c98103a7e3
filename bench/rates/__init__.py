"""Which learning rates AdamCM needs, with AdamW's scale and without; what C and λ change."""
