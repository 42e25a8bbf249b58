"""The border between organisations: identity and transport for members with separate Ray clusters. No Ray."""
