"""The loss half: log-probabilities of tokens, and preference losses on them, from logits or from hidden states."""
