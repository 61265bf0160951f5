"""A fixed list of common English nouns: keys of dictionaries in probes and tasks."""

from __future__ import annotations

_WORDS = """
acorn actor airport album anchor angle animal ankle answer apple apron arch arm army arrow
artist attic aunt author autumn award baby badge bag baker ball balloon banana band bank
barn barrel basin basket bath beach bead beak bean bear beard bed bee beetle bell belt bench
berry bicycle bird biscuit blanket blossom board boat body bone bonnet book boot border bottle
boulder bow bowl box branch bread breeze brick bridge broom brother brush bucket bug builder
bus bush butter button cabbage cabin cable cage cake camel camera camp canal candle candy cannon
canoe captain car card carpet carrot cart castle cat cattle cave cellar chain chair chalk
cheek cheese cherry chest chicken chimney church circle circus city clay clerk cliff clock
cloth cloud clown coach coal coast coat coffee coin collar comb cook copper corn corner cottage
cotton couch cousin cow crab cradle crane crayon cream creek crib crow crowd crown cup curtain
daisy dancer deer desert desk diamond dinner doctor dog doll donkey door dragon drawer dress
drum duck eagle ear earth egg elbow engine eye fairy family farm farmer father feather fence
field finger fire fish flag flame flock floor flower flute fog food foot forest fork fox frame
friend frog fruit garden gate ghost giant gift girl glass glove goat gold goose grape grass
guitar hair hall hammer hand harbor hat hawk hen hill honey hook horse hotel house island jacket
jar jelly jewel judge juice kettle key king kitchen kite kitten knee knife ladder lake lamb lamp
leaf leather lemon letter lion lizard lock magnet mail map marble market mask meadow melon
milk mirror monkey moon mother mountain mouse nail napkin neck needle nest net night nose ocean
onion orange oven owl oyster painter palace paper parent park parrot peach pear pearl pencil
pepper piano picture pig pilot pillow planet plate pocket poet potato prince pumpkin puppy queen
rabbit railway rain ribbon rice ring river road robin rocket roof room rope rose ruler saddle
sailor salt sand school scissors seed shadow sheep shelf shell ship shirt shoe silver sister sky
sled snail snake snow soap sofa soldier spider spoon spring squirrel stairs star statue stone
storm street sugar summer sun swan table tail teacher temple tent thread throat thumb tiger toad
tooth towel tower toy train tree truck trumpet turtle uncle valley vase village violin voice
wagon wall water wheel whistle window wing winter wolf wood wool yard zebra
"""

NOUNS: tuple[str, ...] = tuple(_WORDS.split())
