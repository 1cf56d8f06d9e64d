"""What the built-in model can know: the words, facts and texts that its dialogues are made of. Data only."""

from typing import NamedTuple


class Fixed(NamedTuple):
    """A kind of question with one answer: how often it comes up, and the forms that it takes."""

    kind: str
    weight: int
    answer: str
    prompts: str


def listed(text: str, separator: str = " ") -> list[str]:
    return text.split(separator)


def paired(text: str) -> dict[str, str]:
    """``key:value|key:value`` as a dictionary."""
    return dict(pair.split(":") for pair in text.split("|"))


CAPITALS = paired(
    "France:Paris|Germany:Berlin|Italy:Rome|Spain:Madrid|Portugal:Lisbon|Austria:Vienna|Switzerland:Bern|"
    "Belgium:Brussels|Netherlands:Amsterdam|Poland:Warsaw|Norway:Oslo|Sweden:Stockholm|Finland:Helsinki|"
    "Denmark:Copenhagen|Iceland:Reykjavik|Ireland:Dublin|England:London|Scotland:Edinburgh|Greece:Athens|"
    "Turkey:Ankara|Hungary:Budapest|Romania:Bucharest|Bulgaria:Sofia|Croatia:Zagreb|Ukraine:Kyiv|Russia:Moscow|"
    "Egypt:Cairo|Kenya:Nairobi|Ghana:Accra|Morocco:Rabat|Nigeria:Abuja|India:New Delhi|China:Beijing|Japan:Tokyo|"
    "Thailand:Bangkok|Vietnam:Hanoi|Indonesia:Jakarta|Canada:Ottawa|Mexico:Mexico City|Cuba:Havana|Brazil:Brasilia|"
    "Argentina:Buenos Aires|Chile:Santiago|Peru:Lima|Colombia:Bogota|Australia:Canberra"
)
OPPOSITES = paired(
    "hot:cold|big:small|fast:slow|up:down|left:right|day:night|good:bad|happy:sad|old:new|long:short|light:dark|"
    "open:closed|hard:soft|rich:poor|full:empty|early:late|near:far|wet:dry|strong:weak|loud:quiet"
)
SOUNDS = paired("dog:woof|cat:meow|cow:moo|duck:quack|sheep:baa|horse:neigh|pig:oink|lion:roar")
HELLOS = paired(
    "French:Bonjour|German:Hallo|Spanish:Hola|Italian:Ciao|"
    "Japanese:こんにちは|Russian:Привет|Greek:Γειά σου|Chinese:你好"
)
EMOJI = paired("smile:😀|heart:❤️|rocket:🚀|cat:🐱|sun:☀️|pizza:🍕|fire:🔥|star:⭐")
COLORS = paired(
    "the sky:blue|grass:green|snow:white|a banana:yellow|blood:red|coal:black|an orange:orange|the sun:yellow"
)
FACTS = {
    "fastchat-q": "fastchat-q serves language models through a durable Redis job queue.",
    "Redis": "Redis is a fast database that lives in memory.",
    "Python": "Python is a programming language.",
    "an LLM": "An LLM is a large language model: a program that writes text.",
    "a token": "A token is a small piece of text.",
    "a GPU": "A GPU is a chip that does many sums at once.",
    "an API": "An API is how programs talk to each other.",
    "a queue": "A queue keeps jobs in order until a worker is free.",
    "streaming": "Streaming sends an answer piece by piece.",
}

DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = listed("January February March April May June July August September October November December")
NAMES = listed(
    "Alice Ann Anna Ben Bob Carl David Dora Emma Eve Finn Gus Hana Ivan Jane John Kim Leo Lisa Maria Mary Max Mia "
    "Nora Omar Paul Peter Rosa Sam Sarah Tom Uma Vera Will Zoe Alex"
)
NOUNS = listed(
    "apple pear plum tree house river stone cloud fish bird cat dog horse cow sun moon star rain snow wind fire water "
    "bread milk table chair door window book pen paper lamp shoe hat ball train car boat road bridge king queen song "
    "game garden flower leaf grass sand sea hill forest city"
)
WORDS = NOUNS + listed("red blue green yellow black white hello world test this is a")
NUMBERS = listed("zero one two three four five six seven eight nine ten eleven twelve")
STORY_ANIMALS = [*SOUNDS, "bird", "dragon", "robot", "wolf"]

SYSTEM_PROMPTS = 4 * ["You are a helpful assistant."] + [
    "You are a helpful, friendly assistant.",
    "You are Pip.",
    "Be brief.",
    "Answer in one sentence.",
]

# One answer to a handful of prompts each.
FIXED = [
    Fixed(
        "greeting",
        4,
        "Hello! How can I help you?",
        "Hi!|Hi!|Hello!|Hello!|Hey!|Hi there!|Hello there!|Hey there!|Good morning!|Good afternoon!|"
        "Good evening!|Hey Pip!|Hello Pip!|Hi Pip!|Hello, world!|Howdy!",
    ),
    Fixed("say hello", 1, "Hello!", "Say hello.|Say hi.|Just say hello.|Just say hi.|Please say hello.|Say hello!"),
    Fixed(
        "how are you",
        2,
        "I am fine, thank you! How are you?",
        "How are you?|How are you?|How are you today?|How do you do?|How are you doing?|How is it going?|"
        "Hello, how are you?|Hi, how are you?|Hello! How are you?|Hi! How are you today?",
    ),
    Fixed(
        "who are you",
        2,
        "I am Pip, the tiny demo model of fastchat-q.",
        "Who are you?|What are you?|What is your name?|What's your name?|Tell me about yourself.|"
        "Introduce yourself.|Hello, who are you?|Hi, who are you?|What model are you?|Which model are you?",
    ),
    Fixed(
        "abilities",
        1,
        "I can chat a little, do small sums, count, name capitals, repeat words, tell stories and call tools.",
        "What can you do?|What can you do for me?|Help!|What do you know?|What can I ask you?|Can you help me?|"
        "How can you help me?",
    ),
    Fixed(
        "robot",
        1,
        "Yes, I am a tiny AI model.",
        "Are you a robot?|Are you an AI?|Are you AI?|Are you a bot?|Are you a machine?|Are you a model?",
    ),
    Fixed(
        "human",
        1,
        "No, I am a tiny AI model.",
        "Are you human?|Are you a human?|Are you a person?|Are you ChatGPT?",
    ),
    Fixed(
        "maker",
        1,
        "The fastchat-q project made me as its tiny demo model.",
        "Who made you?|Who created you?|Who built you?|Who trained you?|Who is your maker?",
    ),
    Fixed("age", 1, "I am a program, so I have no age.", "How old are you?|What is your age?|When were you born?"),
    Fixed("thanks", 1, "You are welcome!", "Thanks!|Thank you!|Thank you very much!|Great, thanks!|Thanks a lot!"),
    Fixed("praise", 1, "I am glad to hear that!", "Ok.|Okay.|Good.|Great!|Nice!|Cool!|I am fine.|Well done!"),
    Fixed("farewell", 1, "Goodbye! Have a nice day!", "Bye!|Bye bye!|Goodbye!|See you later!|See you!|Good night!"),
    Fixed("test", 1, "The test works!", "Test|Test!|Testing.|This is a test.|Is this working?"),
    Fixed("meaning of life", 1, "Some say it is 42.", "What is the meaning of life?|What's the meaning of life?"),
    Fixed(
        "joke",
        1,
        "Why did the token cross the road? To get to the other string.",
        "Tell me a joke.|Tell a joke.|Do you know a joke?|Make me laugh.|A joke, please.|Say something funny.",
    ),
    Fixed(
        "other joke",
        1,
        "I know a joke about a queue, but you will have to wait for it.",
        "Tell me another joke.|Another joke, please.|Another joke.|One more joke.",
    ),
    Fixed(
        "your name",
        1,
        "You have not told me your name.",
        "What is my name?|Do you know my name?|Who am I?|What's my name?",
    ),
]

UNKNOWN = "I am only a tiny demo model, so I do not know that."
TOO_BIG = "Those numbers are too big for me. I am only a tiny demo model."
HAIKU = "Words wait in a queue,\none by one the tokens come:\nsoft rain on a stream."
POEM = (
    "The moon looked down upon the sea\nand sang a little song to me.\n"
    "I sang it back, the night was long,\nand all the stars now know the song."
)
# The frames of the stories: who it is about, and what to call them within a sentence and at the start of one.
STORY = (
    "Once upon a time there was {who}. One day {it} went to the forest and found a golden key. {It} took the key home "
    "and opened an old box. Inside the box was a little song. {It} sang it every day and was happy ever after."
)
LONG_STORY = (
    "Once upon a time there was {who} who lived in a small house by the sea. Every morning {it} walked along the sand "
    "and looked at the boats. One day the waves brought a bottle. Inside the bottle was an old map, and on the map was "
    "a red cross. {It} packed some bread, an apple and a warm coat, and went to look for it.\n\n"
    "On the first day {it} crossed a dark forest, where an owl showed the way. On the second day {it} climbed a high "
    "hill, where the wind sang songs. On the third day {it} came to a bridge, and on the bridge sat an old goat. "
    '"What is the best thing in the world?" asked the goat. {It} thought for a while and said: "A friend to share it '
    'with." The goat smiled and let {it} pass.\n\n'
    "Behind the bridge stood a tree with a red cross on it. {It} dug and dug, and found a box. There was no gold in "
    "it, but a lamp that never went out. {It} carried the lamp home and put it in the window, so that every boat could "
    "find its way. And if you walk along the sea at night, you can see it shine."
)
