"""What tests share: small worlds, hosts, kills, stores."""
