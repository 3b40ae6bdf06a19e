"""From objects in a bucket to tokenised examples, in one deterministic order."""
