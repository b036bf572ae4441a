"""Reading answers is `inferlab.client.answers`; this path is kept for scripts that know it."""

from inferlab.client.answers import AnswerError as AnswerError
from inferlab.client.answers import read_stream as read_stream
