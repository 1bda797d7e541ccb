// OpenAI's client for node and the ai-sdk against a running server: node clients.mjs URL
// Every check throws when something is not as these clients expect it. The server's engine may be a
// simulated one: answers are nonsense, but in the form that was asked for.

import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import OpenAI from "openai";

const baseURL = `${process.argv[2]}/v1`;
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const model = (await client.models.list()).data[0].id;
const messages = [{ role: "user", content: "Hi" }];

const WEATHER = {
  type: "object",
  properties: { city: { enum: ["Oslo", "Rome"] }, days: { type: "integer", minimum: 1, maximum: 9 } },
  required: ["city", "days"],
  additionalProperties: false,
};

function isWeather(value) {
  assert.ok(["Oslo", "Rome"].includes(value.city), JSON.stringify(value));
  assert.ok(value.days >= 1 && value.days <= 9, JSON.stringify(value));
}

const checks = {
  async "openai-node: a chat, whole"() {
    const reply = await client.chat.completions.create({ model, messages, max_tokens: 5, n: 2 });
    assert.equal(reply.choices.length, 2);
    assert.equal(reply.choices[1].finish_reason, "length");
    assert.equal(reply.usage.completion_tokens, 10);
  },
  async "openai-node: a chat, streamed, through its helper"() {
    const stream = client.chat.completions.stream({
      model, messages, max_tokens: 5, stream_options: { include_usage: true },
    });
    const completion = await stream.finalChatCompletion();
    assert.equal(completion.choices[0].message.role, "assistant");
    assert.equal(completion.usage.completion_tokens, 5);
  },
  async "openai-node: a call of a tool, streamed"() {
    const tools = [{ type: "function", function: { name: "weather", parameters: WEATHER } }];
    const stream = client.chat.completions.stream({
      model, messages, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 300,
    });
    const { finish_reason, message } = (await stream.finalChatCompletion()).choices[0];
    assert.equal(finish_reason, "tool_calls");
    assert.equal(message.tool_calls.length, 1);
    isWeather(JSON.parse(message.tool_calls[0].function.arguments));
  },
  async "openai-node: a schema"() {
    const json_schema = { name: "weather", schema: WEATHER, strict: true };
    const reply = await client.chat.completions.create({
      model, messages, max_tokens: 300, response_format: { type: "json_schema", json_schema },
    });
    isWeather(JSON.parse(reply.choices[0].message.content));
  },
  async "openai-node: completions with logprobs"() {
    const reply = await client.completions.create({ model, prompt: "abc", max_tokens: 3, logprobs: 2 });
    assert.equal(reply.choices[0].logprobs.tokens.length, 3);
  },
  async "openai-node: a response, streamed"() {
    const stream = client.responses.stream({ model, input: "Hi", max_output_tokens: 5 });
    const kinds = [];
    for await (const event of stream) kinds.push(event.type);
    assert.equal(kinds[0], "response.created");
    assert.equal(kinds.at(-1), "response.incomplete");
    assert.equal((await stream.finalResponse()).usage.output_tokens, 5);
  },
  async "openai-node: errors have their classes"() {
    await assert.rejects(
      client.chat.completions.create({ model, messages, temperature: 9 }),
      (error) => error instanceof OpenAI.BadRequestError && error.param === "temperature",
    );
    await assert.rejects(client.models.retrieve("none"), OpenAI.NotFoundError);
  },
  async "openai-node: leaving a stream"() {
    const stream = await client.chat.completions.create({
      model, messages, max_tokens: 1000, stream: true,
    });
    for await (const chunk of stream) if (chunk.choices[0].delta.content) break;
  },
  async "ai-sdk: text, whole and streamed"() {
    const provider = createOpenAICompatible({ name: "pie", baseURL, includeUsage: true });
    const whole = await generateText({ model: provider(model), prompt: "Hi", maxOutputTokens: 5 });
    assert.equal(whole.finishReason, "length");
    const stream = streamText({ model: provider(model), prompt: "Hi", maxOutputTokens: 5 });
    let text = "";
    for await (const piece of stream.textStream) text += piece;
    assert.equal(text.length, 5);
    assert.equal((await stream.usage).outputTokens, 5);
  },
  async "ai-sdk: a call of a tool"() {
    const provider = createOpenAICompatible({ name: "pie", baseURL });
    const tools = { weather: tool({ inputSchema: jsonSchema(WEATHER) }) };
    const stream = streamText({
      model: provider(model), prompt: "Hi", tools, toolChoice: "required", maxOutputTokens: 300,
    });
    const calls = await stream.toolCalls;
    assert.ok(calls.length >= 1);
    calls.forEach((call) => isWeather(call.input));
    assert.equal(await stream.finishReason, "tool-calls");
  },
  async "ai-sdk: an object by its schema"() {
    const provider = createOpenAICompatible({
      name: "pie", baseURL, supportsStructuredOutputs: true,
    });
    const reply = await generateObject({
      model: provider(model), prompt: "Hi", schema: jsonSchema(WEATHER), maxOutputTokens: 300,
    });
    isWeather(reply.object);
  },
};

let failed = 0;
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok      ${name}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}\n${error.stack ?? error}`);
  }
}
process.exit(failed ? 1 : 0);
