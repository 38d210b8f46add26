"""Pre-training a decoder by reconstruction: a text or an image has to go through its EOS embedding (`cuvee pretrain`)."""
