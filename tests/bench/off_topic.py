"""A hundred sentences far from databases and software, each with a question about it in other words."""

from __future__ import annotations

# (sentence, question); a question shares the subject of its sentence, not its wording.
OFF_TOPIC = (
    # Cooking
    (
        "Simmer the lamb shanks with rosemary and red wine until the meat falls off the bone.",
        "how to braise lamb so that the meat is tender, with rosemary and wine",
    ),
    (
        "Fold the whipped egg whites gently into the chocolate, or the mousse will lose its air.",
        "why did my chocolate mousse collapse after adding beaten egg whites",
    ),
    (
        "A sourdough starter wants fresh flour and lukewarm water every day, and it bubbles when it is ready.",
        "feeding a sourdough culture with flour and water",
    ),
    (
        "Toast cumin and coriander seeds in a dry pan before you grind them for the curry.",
        "roasting whole spices such as cumin and coriander for a curry",
    ),
    (
        "The risotto is stirred with hot chicken broth, a ladle at a time, until the rice is creamy.",
        "cooking creamy Italian rice with ladles of chicken broth",
    ),
    (
        "Salted butter and brown sugar melt together into a caramel for the apple tart.",
        "caramel of butter and brown sugar on an apple pie",
    ),
    (
        "Fishmongers sell mussels alive; throw away every shell that stays closed after steaming.",
        "steamed mussels whose shells do not open, are they safe to eat",
    ),
    # Sailing and the sea
    (
        "The skipper reefed the mainsail before the squall struck the little sloop off the headland.",
        "shortening the mainsail of a sloop ahead of a squall",
    ),
    (
        "With the tide against them, the oarsmen rowed four hours to reach the lighthouse.",
        "rowing against the tide towards a lighthouse",
    ),
    (
        "Barnacles grow on a wooden hull within one summer and slow the yacht by a knot.",
        "scraping barnacles from the hull of a yacht",
    ),
    (
        "The harbour pilot climbs a rope ladder up the ship's side, even in a gale.",
        "harbour pilots who board ships by rope ladder in a gale",
    ),
    (
        "Humpback whales sing for hours in warm lagoons, and each herd has its own melody.",
        "songs of humpback whales in the lagoons",
    ),
    (
        "Trawlers land herring and mackerel at dawn, and gulls follow them to the quay.",
        "herring and mackerel caught by trawlers, gulls at the quay",
    ),
    # Medieval history
    (
        "The abbot granted the miller a charter in 1243, sealed with green wax.",
        "medieval charter with a wax seal that an abbot gave a miller",
    ),
    (
        "Knights in chain mail besieged the castle for eleven weeks, but its well never ran dry.",
        "siege of a castle by knights in chain mail",
    ),
    (
        "Monks copied the psalter on calfskin and painted its capitals with gold leaf.",
        "illuminated manuscripts, psalters painted by monks with gold leaf",
    ),
    (
        "The plague emptied whole villages, and sheep grazed where peasants had ploughed.",
        "villages deserted after the plague, peasants gone and sheep grazing",
    ),
    (
        "A jester might mock the duke at supper, yet no courtier would have dared.",
        "court jesters who mocked their duke",
    ),
    (
        "Pilgrims wore a scallop shell on their cloaks on the road to Santiago.",
        "scallop shells worn by pilgrims walking to Santiago",
    ),
    (
        "The Viking longship was buried under a mound with its queen, her horses and a sledge.",
        "Viking queen buried in a ship under a burial mound",
    ),
    # Gardening
    (
        "Prune the rose bushes in March, just above a bud that points outwards.",
        "when do I cut back my roses, and above which bud",
    ),
    (
        "Slugs devour young lettuce overnight; a ring of crushed eggshells keeps them off.",
        "keeping slugs away from lettuce with eggshells",
    ),
    (
        "Tomato seedlings on the windowsill grow tall and pale when they lack sunlight.",
        "pale leggy tomato seedlings without enough sunlight",
    ),
    (
        "Compost of leaves, coffee grounds and straw warms itself to sixty degrees within a week.",
        "a compost heap of leaves and straw that warms up",
    ),
    (
        "Tulip bulbs are planted in autumn, three times as deep as they are thick.",
        "how deep to plant tulip bulbs in autumn",
    ),
    (
        "The wisteria climbs the pergola and flowers in long lilac clusters in May.",
        "lilac flowers of a wisteria climbing a pergola",
    ),
    (
        "Earthworms loosen heavy clay soil better than any spade.",
        "earthworms that loosen clay soil",
    ),
    # Music
    (
        "The cellist tuned her gut strings a semitone lower for the baroque suites.",
        "baroque cello suites on gut strings",
    ),
    (
        "A muted trumpet answers the saxophone in the second chorus of the blues.",
        "blues chorus with saxophone and muted trumpet",
    ),
    (
        "The choir rehearsed the requiem in the cold cathedral, their breath hanging over the altar.",
        "requiem sung by a choir in a cathedral",
    ),
    (
        "The old organ bellows were pumped by two boys who hid behind the pipes.",
        "boys pumping the bellows of a church organ",
    ),
    (
        "A luthier carves the violin's belly from spruce and its back from maple.",
        "which woods, spruce or maple, a violin maker carves",
    ),
    (
        "Flamenco dancers stamp the rhythm while the guitarist plucks and the singer wails.",
        "flamenco guitarist, singer and dancers stamping",
    ),
    # Football and other sports
    (
        "The goalkeeper tipped the penalty over the crossbar in the last minute of the derby.",
        "penalty saved by the goalkeeper in a derby",
    ),
    (
        "The winger dribbled past two defenders and crossed for the striker's header.",
        "striker's header after the winger beat the defenders",
    ),
    (
        "The marathon runner collapsed in the heat three kilometres before the stadium.",
        "exhausted runner who collapsed in a marathon",
    ),
    (
        "Cyclists climbed the mountain pass in rain and hail, and a Belgian won the stage.",
        "Belgian cyclist winning a mountain stage in the rain",
    ),
    (
        "The tennis champion broke her racket after a double fault at match point.",
        "tennis player smashing her racket after a double fault",
    ),
    (
        "Judo wrestlers bow to each other before they step onto the mat.",
        "bowing before a judo fight on the mat",
    ),
    (
        "The jockey was thrown at the third fence, and the horse finished alone.",
        "horse that lost its jockey at a fence",
    ),
    # Astronomy
    (
        "Saturn's rings are made of ice and dust, and they will be gone in a hundred million years.",
        "ice and dust in the rings of Saturn",
    ),
    (
        "During the solar eclipse the birds fell silent and the corona stood around the black moon.",
        "birds silent as the moon covered the sun in an eclipse",
    ),
    (
        "The comet's tail always points away from the sun, whichever way the comet flies.",
        "direction of a comet's tail and the sun",
    ),
    (
        "A supernova outshone its whole galaxy for three weeks, then faded into a nebula.",
        "exploding star, a supernova brighter than its galaxy",
    ),
    (
        "Meteor showers in August come from dust that a comet left along its orbit.",
        "shooting stars of August, meteors from a comet's dust",
    ),
    (
        "Jupiter's moon Europa hides a salty ocean beneath its icy crust.",
        "ocean under the ice of Europa, a moon of Jupiter",
    ),
    # Knitting, sewing, crafts
    (
        "Cast on sixty stitches of merino wool and knit the cuff of the sock in ribbing.",
        "knitting a wool sock, how many stitches for the cuff",
    ),
    (
        "The crochet blanket is made of granny squares in mustard and teal yarn.",
        "granny squares of coloured yarn for a crocheted blanket",
    ),
    (
        "The tailor lets out the trousers' waist and takes up the hem by hand.",
        "tailor who alters trousers at waist and hem",
    ),
    (
        "The potter centres wet clay on the wheel and glazes the bowls with wood ash.",
        "clay bowls thrown on a potter's wheel with ash glaze",
    ),
    (
        "Quilters sew scraps of calico into stars, then stitch them to the batting.",
        "patchwork quilt sewn from calico scraps",
    ),
    (
        "Beeswax candles burn longer than tallow and smell of honey.",
        "honey smell of beeswax candles",
    ),
    # Animals
    (
        "The vixen moved her cubs one by one to another den after the dogs had come near.",
        "a fox carrying its cubs to a new den, afraid of dogs",
    ),
    (
        "Storks nest on the chimney every April and clatter their beaks at dawn.",
        "stork nest on a chimney, clattering beaks",
    ),
    (
        "A hedgehog sleeps through winter under a pile of leaves, its heart beating five times a minute.",
        "hedgehog hibernating under leaves in winter",
    ),
    (
        "Bees tell each other by a dance how far the clover meadow is.",
        "dancing bees that show the way to a meadow",
    ),
    (
        "The elephant matriarch remembered the waterhole from a drought thirty years ago.",
        "old elephant leading the herd to a waterhole in drought",
    ),
    (
        "Salmon leap up the waterfall to spawn in the brook where they hatched.",
        "salmon that jump a waterfall to spawn",
    ),
    (
        "The sheepdog drove the lambs through the gate without one bark.",
        "sheepdog herding lambs through a gate",
    ),
    (
        "Penguins huddle on the Antarctic ice and take turns on the windy side.",
        "penguins huddling together against Antarctic wind",
    ),
    # Weather and mountains
    (
        "An avalanche buried the alpine hut, but the mountaineers dug themselves out with their skis.",
        "mountaineers in the Alps buried by an avalanche",
    ),
    (
        "Fog rolled down the valley before sunrise and the cowbells sounded far away.",
        "cowbells heard through fog in the valley",
    ),
    (
        "The glacier has retreated a mile since my grandmother photographed it.",
        "retreating glacier photographed by grandmother",
    ),
    (
        "Hail the size of walnuts flattened the vineyard a week before harvest.",
        "vineyard destroyed by hail shortly before the harvest",
    ),
    (
        "The volcano spat ash over the fishing villages, and lava reached the sea by night.",
        "lava and ash of a volcano near fishing villages",
    ),
    # Medicine and body
    (
        "The midwife boiled water and warmed towels while the baby's head was crowning.",
        "midwife helping at the birth of a baby",
    ),
    (
        "A broken wrist is put in plaster for six weeks, and the fingers are to be moved daily.",
        "plaster cast for a broken wrist",
    ),
    (
        "The dentist drilled the molar and filled its cavity with gold.",
        "cavity in a molar filled by the dentist",
    ),
    (
        "Hay fever makes her eyes itch as soon as the birch trees blossom.",
        "itching eyes from birch pollen, hay fever",
    ),
    (
        "The surgeon sewed the torn tendon of the ballerina's ankle with eleven stitches.",
        "surgery on a ballerina's torn ankle tendon",
    ),
    (
        "Elderberry syrup and hot lemon soothe a sore throat.",
        "lemon and elderberry for a sore throat",
    ),
    # Family and everyday life
    (
        "Grandfather taught us to whistle with a blade of grass between our thumbs.",
        "grandfather whistling on a blade of grass",
    ),
    (
        "The twins quarrelled over the window seat all the way to the seaside.",
        "twins quarrelling about a seat on the trip to the seaside",
    ),
    (
        "At the wedding the bride danced barefoot and the uncles sang till morning.",
        "barefoot bride dancing at her wedding",
    ),
    (
        "The toddler threw his porridge on the floor, and the cat ate it.",
        "porridge thrown by a toddler and eaten by the cat",
    ),
    (
        "The laundry froze on the line and the shirts stood stiff as boards.",
        "frozen shirts on the laundry line",
    ),
    (
        "The landlady rents the attic to two violin students and complains of the noise.",
        "students lodging in an attic, the landlady hates their violin",
    ),
    # Theatre, painting, books
    (
        "Rembrandt painted himself in a velvet beret, older and sadder in each portrait.",
        "self-portraits of Rembrandt in old age",
    ),
    (
        "The actress forgot her lines in Hamlet, and Ophelia drowned in silence.",
        "actress as Ophelia who forgot her lines in Hamlet",
    ),
    (
        "The detective found the butler's cufflink in the rhododendrons beside the corpse.",
        "detective story, the butler's cufflink near the corpse",
    ),
    (
        "Her sonnets mourn a lover who was lost in the war.",
        "sonnets mourning a lover killed in war",
    ),
    (
        "The puppeteer made the wooden wolf gobble up the king to the children's delight.",
        "puppet theatre for children with a wooden wolf and a king",
    ),
    (
        "Watercolour dries lighter than it looks, so the painter mixes a deeper blue for the sky.",
        "painting a blue sky in watercolour",
    ),
    # Crafts of old, farming
    (
        "The blacksmith quenched the red-hot horseshoe in a barrel of rainwater.",
        "blacksmith cooling a hot horseshoe in water",
    ),
    (
        "Oxen trod the barley on the threshing floor, and women winnowed it in the wind.",
        "threshing and winnowing barley with oxen",
    ),
    (
        "The cheesemaker turns the wheels of Gruyère each week and rubs them with brine.",
        "wheels of Gruyère cheese rubbed with brine",
    ),
    (
        "The cooper bends oak staves over a fire to make a barrel for brandy.",
        "oak barrels made by a cooper for brandy",
    ),
    (
        "Saffron is picked by hand at dawn, three threads from each crocus.",
        "harvesting saffron from crocus flowers by hand",
    ),
    (
        "The shepherd counted his flock at dusk and went back for the lame ewe.",
        "shepherd looking for a lame ewe of his flock",
    ),
    # Travel
    (
        "The camel caravan carried salt across the desert, from one oasis to the next.",
        "camels carrying salt through the desert to an oasis",
    ),
    (
        "In Lisbon the yellow tram squeals up the hill past tiled houses and laundry.",
        "yellow trams on the hills of Lisbon",
    ),
    (
        "The night train to Vienna had velvet curtains and a steward who brought coffee.",
        "coffee on the sleeper train to Vienna",
    ),
    (
        "Gondoliers in Venice sing for tourists, but never before breakfast.",
        "singing gondoliers and tourists in Venice",
    ),
    (
        "We slept in a yurt on the steppe and drank fermented mare's milk.",
        "nights in a yurt with mare's milk on the steppe",
    ),
    (
        "The monastery on the cliff could be reached only in a basket hauled by monks.",
        "cliff monastery reached in a basket pulled up by monks",
    ),
    # Religion, folklore, law of old
    (
        "The rabbi lit the eighth candle of the menorah while the grandchildren spun dreidels.",
        "grandchildren and candles on the menorah with the rabbi",
    ),
    (
        "In the fairy tale the frog becomes a prince when the princess throws him at the wall.",
        "fairy tale of a princess, a frog and a prince",
    ),
    (
        "The judge fined the poacher two geese and a day in the stocks.",
        "poacher fined with geese and put in the stocks",
    ),
    (
        "Lanterns of paper float down the river to guide the souls of the ancestors home.",
        "paper lanterns on the river for the souls of ancestors",
    ),
    (
        "The gravedigger rang the chapel bell at noon, though no funeral had been announced.",
        "chapel bell rung by a gravedigger without a funeral",
    ),
)
