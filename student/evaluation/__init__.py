"""How far a student is from its teacher, and how runs compare."""
