"""Prompt attacks: templates, prefilling, best-of-n and GCG. All return `refusallab.attacks.result.AttackResult`."""
