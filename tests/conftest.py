"""A busy machine makes no property fail, and it is no matter from where the tests are started."""

import signal

from hypothesis import settings

settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

# A shell ignores SIGINT for what it runs in the background, and nohup SIGHUP: so would all that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
