// The page of `plait serve --ui`: each part asks the server's own routes, as any client would.
"use strict";

const { models: MODELS, indexes: INDEXES } = JSON.parse($("#models").textContent);
const TEXTS = JSON.parse($("#texts").textContent);
const current = () => MODELS[$("#model").selectedIndex];
const post = async (path, body) => (await call(path, { model: current().name, ...body })).json();

async function call(path, body, signal) {
  const given = Object.fromEntries(Object.entries(body).filter(([, value]) => value !== "" && value !== null));
  const answer = await fetch(path, {
    method: "POST", body: JSON.stringify(given), headers: { "content-type": "application/json" }, signal,
  });
  if (answer.ok) return answer;
  let text = `${answer.status} ${answer.statusText}`;
  try { text = (await answer.json()).error.message; } catch { /* the status says it */ }
  throw new Error(text);
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

// --- ask ------------------------------------------------------------------------------------------------------

async function answerTo(inputs, shown) {
  const model = current(), box = element("div", { className: "grow" });
  const place = element("article", { className: "answer" }, ...shown, box);
  $("#answer").replaceChildren(place);
  if (model.labelled || !model.kinds.length) {
    const { data, none_of_these: none } = await post("/v1/plait/classify", { input: inputs, top: 5 });
    box.append(element("p", { className: "big" }, none ? TEXTS.not_sure : `${data[0].label} `));
    const table = element("tbody");
    data.forEach(({ label, probability }) => table.append(element("tr", {}, element("td", {}, label),
      element("td", {}, element("meter", { min: 0, max: 1, value: probability })), element("td", {}, percent(probability)))));
    box.append(element("table", { className: "bars" }, table));
    const why = element("button", { type: "button" }, TEXTS.why);
    why.addEventListener("click", guarded(async () => { why.disabled = true; await explain(inputs, data[0].label, box); }));
    box.append(element("p", {}, why));
  } else {
    const messages = [{ role: "user", content: inputs }];
    const { choices } = await post("/v1/chat/completions", { messages, modalities: ["text"] });
    box.append(element("p", { className: "big" }, choices[0].message.content));
  }
}

async function explain(inputs, answer, box) {
  const found = await post("/v1/plait/explain", { input: inputs, answer, image: inputs.some((one) => one.type !== "text") });
  box.append(element("p", {}, `${found.answer}: ${found.measure} ${found.score.toFixed(2)}. ${TEXTS.marks}`));
  found.warnings.forEach((text) => box.append(element("p", { className: "note bad" }, text)));
  if (found.image) box.append(element("img", { src: found.image, alt: TEXTS.marks, className: "pixels overlay" }));
  const most = Math.max(...found.parts.flatMap(({ weights }) => weights.map(Math.abs)), 1e-9);
  found.parts.filter(({ words }) => words).forEach(({ words, weights }) => {
    const line = element("p", { className: "marked" });
    words.forEach((word, i) => {
      const level = Math.round(4 * Math.abs(weights[i]) / most);
      line.append(element("span", { className: `${weights[i] > 0 ? "for" : "against"}${level}` }, word), " ");
    });
    box.append(line);
  });
  if (found.areas) {
    const { random_maps_beaten: beaten, random_maps: maps } = found.areas;
    box.append(element("p", { className: "dim" }, TEXTS.beats.replace("{beaten}", beaten).replace("{maps}", maps)));
  }
}

const askAbout = guarded(async (blob) => {
  const one = await filePart(blob);
  await answerTo([one], [medium(one)]);
});

function askPart() {
  dropZone($("#ask"), async (transfer) => { const [first] = await dropped(transfer); if (first) askAbout(first.file); });
  $("#ask-file").addEventListener("change", (event) => askAbout(event.target.files[0]));
  $("#ask-text").addEventListener("submit", guarded(async (event) => {
    event.preventDefault();
    const { value } = event.target.elements.text;
    if (value.trim()) await answerTo([{ type: "text", text: value }], []);
  }));
  document.addEventListener("paste", (event) => { const [file] = event.clipboardData.files; if (file) askAbout(file); });
  const video = $("#live-video");
  let on = false;
  $("#live-camera").addEventListener("click", guarded(async () => {
    on = !on;
    if (!on) { closeCamera(video); return; }
    await openCamera(video);
    while (on) await askAbout(await photo(video)); // the next image is taken when the last one is answered
  }));
  toggleRecording($("#live-microphone"), askAbout);
}

// --- chat -----------------------------------------------------------------------------------------------------

const conversation = { messages: [], attached: null, stop: null };

function drawTalk() {
  const lines = conversation.messages.map(({ role, content, images, audio }) => {
    const line = element("p", { className: role });
    const parts = typeof content === "string" ? [{ type: "text", text: content }] : content;
    [...parts, ...(images || [])].forEach((one) => line.append(one.type === "text" ? one.text : medium(one)));
    if (audio) line.append(element("audio", { controls: true, src: `data:audio/wav;base64,${audio.data}` }));
    return line;
  });
  $(".talk").replaceChildren(...lines);
  $("#chat-again").disabled = !conversation.messages.length;
  $("#chat-stop").hidden = !conversation.stop;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      const text = line.replace(/^data: /, "");
      if (text !== "[DONE]") yield JSON.parse(text);
    }
  }
}

const reply = guarded(async () => {
  const model = current();
  // A model of records answers media with words, and words with media; it remembers nothing.
  const last = conversation.messages.at(-1);
  const media = typeof last.content !== "string" && last.content.some(({ type }) => type !== "text");
  const made = model.verbs.includes("draw") ? "image" : model.verbs.includes("speak") ? "audio" : "text";
  const kind = model.can_chat || media ? "text" : made;
  const messages = (model.can_chat ? conversation.messages : [last]).map(({ audio, ...message }) => message);
  const answer = { role: "assistant", content: "" };
  conversation.stop = new AbortController();
  conversation.messages.push(answer);
  drawTalk();
  try {
    const body = { model: model.name, messages, stream: true, modalities: [kind], max_completion_tokens: model.room };
    for await (const event of events(await call("/v1/chat/completions", body, conversation.stop.signal))) {
      if (event.error) throw new Error(event.error.message);
      for (const { delta } of event.choices) {
        answer.content += delta.content || "";
        if (delta.images) answer.images = delta.images;
        if (delta.audio) answer.audio = delta.audio;
      }
      drawTalk();
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
  } finally {
    conversation.stop = null;
    drawTalk();
  }
});

function servedChat() {
  const form = $("#chat-form");
  const attach = guarded(async (file) => {
    conversation.attached = await filePart(file);
    $("#chat-attached").textContent = file.name || TEXTS.attach;
  });
  $("#chat-file").addEventListener("change", (event) => attach(event.target.files[0]));
  dropZone(form, async (transfer) => { const [first] = await dropped(transfer); if (first) attach(first.file); });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const text = form.elements.text.value;
    if (!text.trim() && !conversation.attached) return;
    const parts = text ? [{ type: "text", text }] : [];
    const content = conversation.attached ? [...parts, conversation.attached] : text;
    conversation.messages.push({ role: "user", content });
    conversation.attached = null;
    $("#chat-attached").textContent = "";
    form.reset();
    reply();
  });
  form.elements.text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); form.requestSubmit(); }
  });
  $("#chat-stop").addEventListener("click", () => conversation.stop?.abort());
  $("#chat-new").addEventListener("click", () => { conversation.stop?.abort(); conversation.messages = []; drawTalk(); });
  $("#chat-again").addEventListener("click", () => {
    if (conversation.messages.at(-1)?.role === "assistant") conversation.messages.pop();
    if (conversation.messages.length) reply();
  });
}

// --- draw, speak, find ------------------------------------------------------------------------------------------

function tile(shown, ...caption) {
  return element("figure", { className: "tile static" }, shown, element("figcaption", {}, ...caption));
}

function makingParts() {
  let seed = 0;
  const draw = $('[data-verb="draw"]'), speak = $('[data-verb="speak"]');
  $("form", draw).addEventListener("submit", guarded(async (event) => {
    event.preventDefault();
    const prompt = event.target.elements.text.value;
    const { data } = await post("/v1/images/generations", { prompt, n: 4, seed: seed++ });
    const made = data.map((one) => element("img", { src: `data:image/png;base64,${one.b64_json}`, alt: prompt, className: "pixels" }));
    $(".made", draw).prepend(...made.map((one) => tile(one, prompt)));
  }));
  $("form", speak).addEventListener("submit", guarded(async (event) => {
    event.preventDefault();
    const input = event.target.elements.text.value, voice = event.target.elements.voice.value;
    const body = { model: current().name, input, voice, response_format: "wav", seed: seed++ };
    const blob = await (await call("/v1/audio/speech", body)).blob();
    const made = element("audio", { controls: true, src: await dataUrl(new Blob([blob], { type: "audio/wav" })) });
    $(".made", speak).prepend(tile(made, input));
  }));
}

function searchPart() {
  const form = $("#find-form");
  const find = guarded(async (input) => {
    const { data } = await post("/v1/plait/search", { input, k: 24, index: form.elements.index.value });
    $("#found").replaceChildren(...data.map((one) => {
      const tag = current().elements[one.kind];
      const shown = one.preview
        ? element(tag, tag === "img" ? { src: one.preview, alt: "" } : { controls: true, src: one.preview })
        : element("p", { className: "source" }, (one.text || one.source).slice(0, 300));
      const near = one.similarity === null ? "" : ` ${one.similarity.toFixed(2)}`;
      return tile(shown, (one.text || one.source || "").slice(0, 120), element("span", { className: "dim" }, near));
    }));
    if (!data.length) $("#found").textContent = TEXTS.nothing_found;
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (form.elements.text.value.trim()) find(form.elements.text.value);
  });
  $("#find-file").addEventListener("change", guarded(async (event) => find(await filePart(event.target.files[0]))));
}

// --- recommend ------------------------------------------------------------------------------------------------

const chosenItems = [];

function chip(text, work) {
  const made = element("button", { type: "button", className: "chip" }, text);
  made.addEventListener("click", guarded(work));
  return made;
}

async function suggest() {
  $("#history").replaceChildren(...chosenItems.map((one, i) => chip(`${one.title} ✕`, async () => {
    chosenItems.splice(i, 1);
    await suggest();
  })));
  if (!chosenItems.length) { $("#recommended").replaceChildren(); return; }
  const body = { history: chosenItems.map(({ id }) => id), k: 12, why: true, preview: true, where: $("#where-form").elements.where.value };
  show((await post("/v1/plait/recommend", body)).data, true);
}

function show(items, chances) {
  $("#recommended").replaceChildren(...items.map((one) => {
    const shown = one.preview ? element("img", { src: one.preview, alt: "" }) : element("p", { className: "source" }, one.title);
    const why = one.why.length ? `${TEXTS.because} ${one.why.map(({ title }) => title).join(", ")}` : "";
    const add = chip("+", async () => { chosenItems.push(one); await suggest(); });
    add.setAttribute("aria-label", `+ ${one.title}`);
    const like = chip(TEXTS.like_it, async () => show((await post("/v1/plait/similar", { item: one.id, k: 12, preview: true })).data, false));
    const figure = chances ? percent(one.probability) : one.probability.toFixed(3);
    return tile(shown, element("b", {}, one.title), ` ${figure} `, element("span", { className: "dim" }, why), element("br"), add, like);
  }));
}

function recommendPart2() {
  $("#items-form").addEventListener("submit", guarded(async (event) => {
    event.preventDefault();
    await lookUp(event.target.elements.text.value);
  }));
  $("#where-form").addEventListener("submit", guarded(async (event) => { event.preventDefault(); await suggest(); }));
}

async function lookUp(text) {
  const { data } = await post("/v1/plait/items", { text });
  $("#items").replaceChildren(...data.map((one) => chip(`+ ${one.title}`, async () => { chosenItems.push(one); await suggest(); })));
}

// --- what the chosen model does --------------------------------------------------------------------------------

const arrange = guarded(async () => {
  const { verbs, kinds, voices, examples, can_chat: canChat, name } = current();
  const indexes = INDEXES.filter(({ model }) => model === name);
  const media = kinds.includes("image") || kinds.includes("audio") || !kinds.length;
  const parts = {
    ask: ["classify", "describe", "transcribe"].some((verb) => verbs.includes(verb)) && media,
    chat: verbs.includes("generate"), draw: verbs.includes("draw"), speak: verbs.includes("speak"),
    search: indexes.length > 0, recommend: verbs.includes("recommend"),
  };
  $$("[data-verb]").forEach((place) => { place.hidden = !parts[place.dataset.verb]; });
  // The part that the model is for stands first.
  const first = canChat && parts.chat ? "chat" : Object.keys(parts).find((verb) => parts[verb]);
  if (first) $("#served").prepend($(`[data-verb="${first}"]`));
  $$("[data-kind]").forEach((button) => { button.hidden = kinds.length > 0 && !kinds.includes(button.dataset.kind); });
  $("#chat-attach").hidden = !kinds.includes("image") && !kinds.includes("audio");
  $('select[name="voice"]').replaceChildren(...voices.map((voice) => element("option", {}, voice)));
  $('select[name="index"]').replaceChildren(...indexes.map((one) => element("option", {}, one.name)));
  $("#examples").replaceChildren(...examples.map((text) => chip(text, async () => {
    $$('[data-verb="draw"] input, [data-verb="speak"] input, #find-form input[name="text"]').forEach((box) => { box.value = text; });
  })));
  conversation.messages = [];
  drawTalk();
  if (parts.recommend) await lookUp("");
});

askPart();
servedChat();
makingParts();
searchPart();
recommendPart2();
$("#model").addEventListener("change", arrange);
arrange();
