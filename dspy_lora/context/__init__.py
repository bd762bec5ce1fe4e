"""What a prompt holds beside its instruction: playbooks of learned bullets, sources under a token budget."""
