"""At which learning rates AdamCM trains, with and without AdamW's scale, and what C and λ change."""
