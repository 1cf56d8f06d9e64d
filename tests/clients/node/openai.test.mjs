// OpenAI's client for Node, unmodified, on real workers.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import OpenAI, { toFile } from 'openai';
import { zodResponseFormat, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';
import { GREETING, HELLO, TOOLS, WEATHER, apiKey, assertPerson, baseURL } from './shared.mjs';

const client = new OpenAI({ maxRetries: 0 }); // OPENAI_BASE_URL and OPENAI_API_KEY are in the environment
const tools = TOOLS.map(([name, description, parameters]) => ({
  type: 'function',
  function: { name, description, parameters },
}));

test('a completion', async () => {
  const answer = await client.chat.completions.create({ model: 'tiny', messages: HELLO, temperature: 0 });
  assert.equal(answer.choices[0].message.content, GREETING);
  assert.equal(answer.choices[0].finish_reason, 'stop');
  assert.ok(answer._request_id);
});

test('a stream with usage', async () => {
  const stream = await client.chat.completions.create({
    model: 'tiny',
    messages: HELLO,
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = '';
  let usage;
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta?.content ?? '';
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, GREETING);
  assert.ok(usage.completion_tokens > 0);
});

test('the streaming helper', async () => {
  const stream = client.chat.completions.stream({ model: 'tiny', messages: HELLO, temperature: 0, logprobs: true });
  let text = '';
  stream.on('content', (delta) => (text += delta));
  const answer = await stream.finalChatCompletion();
  assert.equal(text, GREETING);
  assert.equal(answer.choices[0].message.content, GREETING);
  assert.ok(answer.choices[0].logprobs.content.length > 0);
});

test('a stream that is left ends the job', async () => {
  const stream = await client.chat.completions.create({
    model: 'echo',
    messages: HELLO,
    max_tokens: 5000,
    ignore_eos: true,
    stream: true,
  });
  for await (const _ of stream) break;
  assert.ok(stream.controller.signal.aborted);
});

test('a zod schema is held to', async () => {
  const Person = z.object({ name: z.string(), age: z.number().int() });
  const answer = await client.chat.completions.parse({
    model: 'tiny',
    messages: HELLO,
    response_format: zodResponseFormat(Person, 'person'),
  });
  assertPerson(answer.choices[0].message.parsed);
});

test('the tool runner calls, is answered, and goes on', async () => {
  const asked = [];
  const runner = client.chat.completions.runTools({
    model: 'tiny',
    temperature: 0,
    messages: [{ role: 'user', content: WEATHER }],
    tools: tools.map((tool) => ({
      type: 'function',
      function: {
        ...tool.function,
        parse: JSON.parse,
        function: ({ city }) => {
          asked.push(city);
          return 'sunny, 20 degrees';
        },
      },
    })),
  });
  assert.equal(await runner.finalContent(), 'The weather in Rome is sunny, 20 degrees.');
  assert.deepEqual(asked, ['Rome']);
});

test('streamed tool calls are put together', async () => {
  const runner = client.chat.completions.stream({
    model: 'tiny',
    temperature: 0,
    messages: [{ role: 'user', content: WEATHER }],
    tools,
  });
  const answer = await runner.finalChatCompletion();
  const [call] = answer.choices[0].message.tool_calls;
  assert.equal(call.function.name, 'get_weather');
  assert.deepEqual(JSON.parse(call.function.arguments), { city: 'Rome' });
  assert.equal(answer.choices[0].finish_reason, 'tool_calls');
});

test('a completion of a text', async () => {
  const answer = await client.completions.create({ model: 'tiny', prompt: 'Hello', max_tokens: 3, temperature: 0 });
  assert.equal(answer.object, 'text_completion');
  assert.equal(answer.usage.completion_tokens, 3);
});

test('responses: whole, streamed, parsed, continued and deleted', async () => {
  const first = await client.responses.create({ model: 'tiny', input: 'My name is Anna.', temperature: 0 });
  assert.equal(first.output_text, 'Nice to meet you, Anna!');
  const stream = client.responses.stream({
    model: 'tiny',
    input: 'What is my name?',
    previous_response_id: first.id,
    temperature: 0,
  });
  const numbers = [];
  stream.on('event', (event) => numbers.push(event.sequence_number));
  const second = await stream.finalResponse();
  assert.equal(second.output_text, 'Your name is Anna.');
  assert.deepEqual(numbers, numbers.map((_, index) => index));
  const parsed = await client.responses.parse({
    model: 'tiny',
    input: 'Hello!',
    text: { format: zodTextFormat(z.object({ ok: z.boolean() }), 'answer') },
  });
  assert.equal(typeof parsed.output_parsed.ok, 'boolean');
  assert.equal((await client.responses.retrieve(second.id)).output_text, 'Your name is Anna.');
  await client.responses.delete(second.id);
  await assert.rejects(client.responses.retrieve(second.id), OpenAI.NotFoundError);
});

test('a response in the background', async () => {
  let answer = await client.responses.create({ model: 'tiny', input: 'Hello!', temperature: 0, background: true });
  while (['queued', 'in_progress'].includes(answer.status)) {
    await new Promise((resolve) => setTimeout(resolve, 100));
    answer = await client.responses.retrieve(answer.id);
  }
  assert.equal(answer.status, 'completed');
  assert.equal(answer.output_text, GREETING);
});

test('embeddings and models', async () => {
  const { data, usage } = await client.embeddings.create({ model: 'embedder', input: ['w1 w2', 'w3'] });
  assert.equal(data.length, 2);
  assert.equal(data[0].embedding.length, 32);
  assert.ok(usage.total_tokens > 0);
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.deepEqual(names.sort(), ['echo', 'embedder', 'tiny']);
  assert.equal((await client.models.retrieve('tiny')).object, 'model');
});

test('a file becomes a batch, and the batch a file', async () => {
  const line = (number) => ({
    custom_id: `line-${number}`,
    method: 'POST',
    url: '/v1/chat/completions',
    body: { model: 'echo', messages: [{ role: 'user', content: `text ${number}` }] },
  });
  const lines = [0, 1, 2].map((number) => JSON.stringify(line(number))).join('\n');
  const file = await client.files.create({ file: await toFile(Buffer.from(lines), 'in.jsonl'), purpose: 'batch' });
  let batch = await client.batches.create({
    input_file_id: file.id,
    endpoint: '/v1/chat/completions',
    completion_window: '24h',
  });
  const ended = ['completed', 'failed', 'expired', 'cancelled'];
  while (!ended.includes(batch.status)) {
    await new Promise((resolve) => setTimeout(resolve, 200));
    batch = await client.batches.retrieve(batch.id);
  }
  assert.equal(batch.status, 'completed');
  assert.equal(batch.request_counts.completed, 3);
  const output = await (await client.files.content(batch.output_file_id)).text();
  const said = output
    .trimEnd()
    .split('\n')
    .map((text) => JSON.parse(text))
    .map((one) => [one.custom_id, one.response.body.choices[0].message.content]);
  assert.deepEqual(said.sort(), [0, 1, 2].map((number) => [`line-${number}`, `text ${number}`]));
  assert.ok((await client.files.delete(file.id)).deleted);
});

test('errors have the classes of the client', async () => {
  const ask = (changes, from = client) => from.chat.completions.create({ model: 'tiny', messages: HELLO, ...changes });
  await assert.rejects(ask({ temperature: 3 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, 'temperature');
    return true;
  });
  await assert.rejects(ask({ model: 'tini' }), OpenAI.NotFoundError);
  const stranger = new OpenAI({ baseURL, apiKey: `${apiKey}-not`, maxRetries: 0 });
  await assert.rejects(ask({}, stranger), OpenAI.AuthenticationError);
  const hasty = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 300 });
  await assert.rejects(
    ask({ model: 'echo', max_tokens: 5000, ignore_eos: true }, hasty),
    OpenAI.APIConnectionTimeoutError,
  );
});
