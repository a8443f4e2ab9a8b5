"""What travels over HTTP, as records: requests are checked against these, and the OpenAPI document shows them."""
