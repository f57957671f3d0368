// openai-node: chat, streams, tools, JSON schema, embeddings.
import { createRequire } from "node:module";
const require = createRequire(process.env.PLAIT_NODE_MODULES + "/");
const OpenAI = require("openai").default;
const client = new OpenAI({ baseURL: process.env.PLAIT_URL + "/v1", apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "the cat" }];
const must = (ok, what) => { if (!ok) throw new Error(what); };
const whole = await client.chat.completions.create({ model: "caller", messages, max_tokens: 8 });
must(whole.choices[0].message.content, "content");
let text = "";
for await (const part of await client.chat.completions.create({ model: "caller", messages, max_tokens: 8, stream: true }))
  text += part.choices[0]?.delta?.content ?? "";
must(text === whole.choices[0].message.content, "stream");
const parameters = { type: "object", properties: { city: { type: "string", enum: ["Paris", "Rome"] } }, required: ["city"], additionalProperties: false };
const tools = [{ type: "function", function: { name: "weather", parameters } }];
const called = await client.chat.completions.create({ model: "caller", messages, tools, tool_choice: "required" });
must(["Paris", "Rome"].includes(JSON.parse(called.choices[0].message.tool_calls[0].function.arguments).city), "tool");
const stream = client.chat.completions.stream({ model: "caller", messages, tools, tool_choice: "required" });
must((await stream.finalChatCompletion()).choices[0].message.tool_calls.length > 0, "streamed tool");
const held = await client.responses.create({ model: "caller", input: "hi", text: { format: { type: "json_schema", name: "x", schema: parameters, strict: true } } });
must(JSON.parse(held.output_text).city, "responses");
must((await client.embeddings.create({ model: "run", input: ["a", "b"] })).data.length === 2, "embeddings");
