"""Words behind which a full stop is often no end of a sentence, and words that begin one.

A few common words of several languages each, in small letters and without the stop. A word that is
missing costs a cut at a bad place, one too many a cut that is not made.
"""

from __future__ import annotations


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


# Never the end of a sentence.
BEFORE_NAMES = _words(
    "mr mrs ms messrs mx dr drs prof rev fr hon gen col maj capt cpt cmdr lt sgt cpl adm brig gov",
    "sen rep pres st ste mt ft hr frl dipl ing mag sra srta sres dña m mm mme mlle mgr v vs cf viz",
    "e.g eg i.e ie ca circa approx bzgl bzw z.b u.a d.h o.ä s.o vgl sog p.ex par.ex dtt",
    "т.е т.к напр г ул им см",
)
# Not the end of a sentence when a number follows.
BEFORE_NUMBERS = _words(
    "no nos nr nrs num núm n n° fig figs abb tab eq eqs p pp pg pag pág s vol vols bd ch chap cap",
    "kap sec sect art arts abs § lit ed eds ver rev op cit jan feb mar apr jun jul aug sep sept",
    "oct nov dec janv févr avr juil déc mär okt dez с стр рис",
)
# The end of a sentence only before a word that often begins one.
AT_BOTH_PLACES = _words(
    "etc usw al inc ltd co corp llc plc bros gmbh jr sr esq dept univ est assn ave blvd rd",
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thur thurs fri",
    "a.m p.m u.s u.k u.n ph.d b.c a.d и.т.д т.д т.п др",
)
OPENING_WORDS = _words(
    "the this that these those a an he she it we they you i his her its our their my your there",
    "here in on at as and but so or if when while after before since because however then thus",
    "for from with by to no yes not what who why how where which",
    "der die das den ein eine es er sie wir ich und aber im am le la les un une il elle nous ce",
    "el los las una pero y o os as um uma lo gli в на и но он она они мы это",
)
# "Am 3. Oktober".
MONTHS = _words(
    "januar februar märz april mai juni juli august september oktober november dezember",
    "jahrhundert jh",
)
