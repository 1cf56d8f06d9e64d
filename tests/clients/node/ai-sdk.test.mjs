// Vercel's AI SDK with its two providers for servers like ours.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, Output, embedMany, generateText, jsonSchema, stepCountIs, streamText, tool } from 'ai';
import { z } from 'zod';
import { GREETING, TERSE, TOOLS, WEATHER, apiKey, assertPerson, baseURL } from './shared.mjs';

const compatible = createOpenAICompatible({
  name: 'fastchat',
  baseURL,
  apiKey,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL, apiKey });
const providers = [
  ['openai-compatible', compatible('tiny'), { fastchat: { logit_bias: TERSE } }],
  ['openai.chat', openai.chat('tiny'), { openai: { logitBias: TERSE } }],
];
const responses = openai('tiny'); // the provider's default: OpenAI's Responses API
const Person = z.object({ name: z.string(), age: z.number().int() });
// As JSON schemas: those that zod makes are not what `tiny` has learnt to read.
const results = { get_weather: () => 'sunny, 20 degrees', add: ({ a, b }) => `${a + b}`, get_time: () => '12:00' };
const tools = Object.fromEntries(
  TOOLS.map(([name, description, schema]) => [
    name,
    tool({ description, inputSchema: jsonSchema(schema), execute: async (input) => results[name](input) }),
  ]),
);
const addByZod = tool({
  description: 'Add two numbers',
  inputSchema: z.object({ a: z.number().int(), b: z.number().int() }),
});

for (const [name, model, terse] of providers) {
  test(`${name}: generateText`, async () => {
    const { text, finishReason, usage } = await generateText({ model, prompt: 'Hello!', temperature: 0 });
    assert.equal(text, GREETING);
    assert.equal(finishReason, 'stop');
    assert.ok(usage.outputTokens > 0);
  });

  test(`${name}: streamText`, async () => {
    const result = streamText({ model, system: 'Be brief.', prompt: 'Hello!', temperature: 0 });
    let text = '';
    for await (const part of result.textStream) text += part;
    assert.ok(text.length > 0);
    assert.ok((await result.usage).outputTokens > 0);
  });

  test(`${name}: an object by its schema`, async () => {
    const { output } = await generateText({
      model,
      prompt: 'Hello!',
      output: Output.object({ schema: Person }),
    });
    assertPerson(output);
  });

  test(`${name}: an object that grows`, async () => {
    const result = streamText({
      model,
      prompt: 'Hello!',
      output: Output.object({ schema: Person }),
    });
    for await (const part of result.partialOutputStream) assert.equal(typeof part, 'object');
    assertPerson(await result.output);
  });

  test(`${name}: a tool is called, answered, and put into words`, async () => {
    const { text, steps } = await generateText({
      model,
      prompt: WEATHER,
      tools,
      temperature: 0,
      stopWhen: stepCountIs(3),
    });
    assert.equal(text, 'The weather in Rome is sunny, 20 degrees.');
    assert.deepEqual(steps[0].toolCalls[0].input, { city: 'Rome' });
  });

  test(`${name}: a streamed tool that must be called`, async () => {
    const result = streamText({
      model,
      prompt: 'Hello!',
      tools: { add: addByZod },
      toolChoice: 'required',
      providerOptions: terse,
    });
    const calls = await result.toolCalls;
    assert.ok(calls.length > 0);
    assert.ok(Number.isInteger(calls[0].input.a) && Number.isInteger(calls[0].input.b));
  });

  test(`${name}: a refusal is an APICallError with the server's words`, async () => {
    await assert.rejects(generateText({ model, prompt: 'Hello!', temperature: 3, maxRetries: 0 }), (error) => {
      assert.ok(APICallError.isInstance(error));
      assert.equal(error.statusCode, 400);
      assert.match(error.message, /temperature/);
      return true;
    });
  });
}

test('openai: text, streams and tools of the Responses API', async () => {
  const { text, usage } = await generateText({ model: responses, prompt: 'Hello!', temperature: 0 });
  assert.equal(text, GREETING);
  assert.ok(usage.outputTokens > 0);
  const result = streamText({ model: responses, prompt: 'Hello!', temperature: 0 });
  let streamed = '';
  for await (const part of result.textStream) streamed += part;
  assert.equal(streamed, GREETING);
  const asked = { model: responses, prompt: WEATHER, tools, temperature: 0, stopWhen: stepCountIs(3) };
  const { text: told, steps } = await generateText(asked);
  assert.deepEqual(steps[0].toolCalls[0].input, { city: 'Rome' });
  assert.equal(told, 'The weather in Rome is sunny, 20 degrees.');
});

test('openai: an object by the Responses API', async () => {
  const Answer = z.object({ ok: z.boolean() });
  const { output } = await generateText({
    model: responses,
    prompt: 'Hello!',
    output: Output.object({ schema: Answer }),
  });
  assert.equal(typeof output.ok, 'boolean');
});

test('embeddings', async () => {
  for (const model of [compatible.embeddingModel('embedder'), openai.embedding('embedder')]) {
    const { embeddings } = await embedMany({ model, values: ['w1 w2', 'w3'] });
    assert.deepEqual(embeddings.map((one) => one.length), [32, 32]);
  }
});
