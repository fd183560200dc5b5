"""What a deployment team signs: statement, envelope, verification."""
