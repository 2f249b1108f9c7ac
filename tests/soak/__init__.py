"""What a server still holds after very many clients have come and gone: ``python -m tests.soak``."""
