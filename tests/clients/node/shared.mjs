import assert from 'node:assert/strict';

// Where the server is, and how `tiny`, which knows no JSON, is led through forced tool calls: a string is closed as soon as the grammar
// lets it be, and a number starts with 3 (tests/clients/python/bias.py).
export const baseURL = process.env.OPENAI_BASE_URL;
export const apiKey = process.env.OPENAI_API_KEY;
export const TERSE = { 4: 100, 2: 100, 95: 97, 14: 95, 21: 90 };
export const HELLO = [{ role: 'user', content: 'Hello!' }];
export const GREETING = 'Hello! How can I help you?';
export const WEATHER = 'What is the weather in Rome?';

const city = { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] };
const numbers = {
  type: 'object',
  properties: { a: { type: 'integer' }, b: { type: 'integer' } },
  required: ['a', 'b'],
};
// Those that `tiny` has learnt to call of itself.
export const TOOLS = [
  ['get_weather', 'Get the weather of a city', city],
  ['add', 'Add two numbers', numbers],
  ['get_time', 'Get the time in a city', city],
];

// What a model says that knows no JSON is anything that its schema allows.
export const assertPerson = ({ name, age }) => {
  assert.equal(typeof name, 'string');
  assert.ok(Number.isInteger(age));
};
