// Vercel's AI SDK: generateText, streamText, generateObject, tools; the default provider (responses) and compatible ones.
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
const require = createRequire(process.env.PLAIT_NODE_MODULES + "/");
const load = async (name) => import(pathToFileURL(require.resolve(name)));
const { generateObject, generateText, streamText, embedMany, tool } = await load("ai");
const { createOpenAI } = await load("@ai-sdk/openai");
const { createOpenAICompatible } = await load("@ai-sdk/openai-compatible");
const { z } = await load("zod");
const must = (ok, what) => { if (!ok) throw new Error(what); };
const baseURL = process.env.PLAIT_URL + "/v1";
const openai = createOpenAI({ baseURL, apiKey: "none" });
const compatible = createOpenAICompatible({ name: "plait", baseURL, apiKey: "none", supportsStructuredOutputs: true });
const schema = z.object({ colour: z.enum(["red", "blue"]), old: z.boolean() });
const weather = tool({ description: "The weather", inputSchema: z.object({ city: z.enum(["Paris", "Rome"]) }), execute: async ({ city }) => `sunny in ${city}` });
for (const [name, model] of [["default", openai("caller")], ["chat", openai.chat("caller")], ["compatible", compatible("caller")]]) {
  const options = { model, prompt: "the cat", maxRetries: 0 };
  must((await generateText({ ...options, maxOutputTokens: 8 })).text, name + " text");
  let text = "";
  for await (const piece of streamText({ ...options, maxOutputTokens: 8 }).textStream) text += piece;
  must(text, name + " stream");
  must(["red", "blue"].includes((await generateObject({ ...options, schema })).object.colour), name + " object");
  const called = await generateText({ ...options, tools: { weather }, toolChoice: "required" });
  must(called.toolResults[0].output.startsWith("sunny"), name + " tool");
}
must((await embedMany({ model: openai.textEmbeddingModel ? openai.textEmbeddingModel("run") : openai.embedding("run"), values: ["a", "b"] })).embeddings.length === 2, "embeddings");
