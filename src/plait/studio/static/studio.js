// The studio's own behaviour: uploads in pieces, selecting and relabelling, camera and microphone, the slider, asking.
// htmx fetches the parts of pages; nothing is loaded from elsewhere and nothing is kept here.
"use strict";

const PIECE = 8 << 20; // bytes of an upload that are sent at once
const SMALL = 1 << 20; // bytes of a file that travels with others
const LIVE = 320; // pixels across that a live camera sends
const TRIES = 6; // of a piece, before an upload is given up
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

function tell(text) {
  const place = $("#message");
  place.textContent = text;
  place.hidden = !text;
  if (text) setTimeout(() => { place.hidden = true; }, 9000);
}

async function ask(address, options = {}) {
  const answer = await fetch(address, { headers: { accept: "application/json", ...options.headers }, ...options });
  if (answer.ok) return answer;
  const said = await answer.text();
  let text = said.length < 300 ? said : `${answer.status} ${answer.statusText}`;
  try { text = JSON.parse(said).error || text; } catch { /* no JSON: the text says it */ }
  throw Object.assign(new Error(text), { refused: true });
}

const send = (address, value) =>
  ask(address, { method: "POST", body: JSON.stringify(value), headers: { "content-type": "application/json" } });

const guarded = (work) => async (...given) => {
  try { return await work(...given); } catch (error) { tell(error.message); return undefined; }
};

// --- files as parts of messages ---------------------------------------------------------------------------------

const dataUrl = (blob) => new Promise((done, failed) => {
  const reader = new FileReader();
  reader.addEventListener("load", () => done(reader.result));
  reader.addEventListener("error", () => failed(reader.error));
  reader.readAsDataURL(blob);
});

// A file as a part of a message.
async function filePart(blob) {
  const url = await dataUrl(blob);
  const audio = /^data:audio\/([a-z0-9.+-]+)[^,]*;base64,/.exec(url) || /^data:video\/(webm|mp4)[^,]*;base64,/.exec(url);
  if (!audio) return { type: "image_url", image_url: { url } };
  const format = { mpeg: "mp3", "x-wav": "wav", wave: "wav", "x-flac": "flac" }[audio[1]] || audio[1];
  return { type: "input_audio", input_audio: { data: url.slice(audio[0].length), format } };
}

function element(name, values = {}, ...inside) {
  const made = Object.assign(document.createElement(name), values);
  made.append(...inside);
  return made;
}

function medium(one) {
  if (one.type === "image_url") return element("img", { src: one.image_url.url, alt: "", className: "pixels" });
  const { data, format } = one.input_audio;
  return element("audio", { controls: true, src: `data:audio/${format};base64,${data}` });
}

// --- uploads --------------------------------------------------------------------------------------------------

// What a broken connection spoils is tried again, ever later; what the server refuses is not.
async function persevere(work) {
  for (let failures = 0; ; failures += 1) {
    try {
      return await work();
    } catch (error) {
      if (error.refused || failures >= TRIES) throw error;
      await new Promise((done) => setTimeout(done, 500 * 2 ** failures));
    }
  }
}

async function upload(project, file, name, progress) {
  const base = `/p/${encodeURIComponent(project)}/uploads`;
  const said = { name, size: file.size, modified: file.lastModified || 0 };
  const begun = await persevere(async () => (await send(base, said)).json());
  let { received } = begun;
  while (received < file.size) {
    const address = `${base}/${begun.id}?offset=${received}`, body = file.slice(received, received + PIECE);
    // A piece that broke off is not taken again: the answer says how much is there by now.
    const { received: now } = await persevere(async () => (await ask(address, { method: "PUT", body })).json());
    if (now === received) throw new Error(`${name}: ${received} / ${file.size}`);
    received = now;
    progress(received);
  }
  return (await (await send(`${base}/${begun.id}/end`, {})).json()).notes;
}

async function uploadBatch(project, batch) {
  const head = JSON.stringify(batch.map(({ file, name }) => [name, file.size]));
  const body = new Blob([`${head}\n`, ...batch.map(({ file }) => file)]);
  await persevere(() => ask(`/p/${encodeURIComponent(project)}/files`, { method: "PUT", body }));
}

const isSmall = ({ file, name }) => file.size < SMALL && !/\.zip$/i.test(name);

// Small files travel together: a request for each would take longer than its bytes.
function* batches(files) {
  let batch = [], size = 0;
  for (const one of files.filter(isSmall)) {
    if (batch.length && (size + one.file.size > PIECE || batch.length >= 500)) {
      yield batch;
      [batch, size] = [[], 0];
    }
    batch.push(one);
    size += one.file.size;
  }
  if (batch.length) yield batch;
}

async function uploadAll(project, files) {
  const shown = $("#uploading");
  const total = files.reduce((sum, { file }) => sum + file.size, 0) || 1;
  let before = 0;
  const notes = [];
  shown.hidden = false;
  const queue = batches(files);
  const sendBatches = async () => {
    for (let next = queue.next(); !next.done; next = queue.next()) {
      const batch = next.value;
      $("span", shown).textContent = batch[0].name;
      await uploadBatch(project, batch);
      before += batch.reduce((sum, { file }) => sum + file.size, 0);
      $("progress", shown).value = before / total;
    }
  };
  await Promise.all([sendBatches(), sendBatches()]); // one travels while the other is written
  for (const { file, name } of files.filter((one) => !isSmall(one))) {
    $("span", shown).textContent = name;
    notes.push(...await upload(project, file, name, (now) => { $("progress", shown).value = (before + now) / total; }));
    before += file.size;
  }
  if (notes.length) tell(notes.slice(0, 5).join(" · "));
  location.reload();
}

async function* entries(entry, path = "") {
  if (entry.isFile) {
    const file = await new Promise((done, failed) => entry.file(done, failed));
    if (!file.name.startsWith(".")) yield { file, name: path + file.name };
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const part = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!part.length) return;
    for (const inside of part) yield* entries(inside, `${path}${entry.name}/`);
  }
}

async function dropped(transfer) {
  const roots = [...transfer.items].map((item) => item.webkitGetAsEntry && item.webkitGetAsEntry()).filter(Boolean);
  if (!roots.length) return [...transfer.files].map((file) => ({ file, name: file.name }));
  const found = [];
  for (const root of roots) for await (const one of entries(root)) found.push(one);
  // One folder that holds class folders: its own name is no label.
  const deep = roots.length === 1 && found.every(({ name }) => name.split("/").length > 2);
  return deep ? found.map(({ file, name }) => ({ file, name: name.split("/").slice(1).join("/") })) : found;
}

function dropZone(place, work) {
  for (const kind of ["dragenter", "dragover"]) {
    place.addEventListener(kind, (event) => { event.preventDefault(); place.classList.add("over"); });
  }
  place.addEventListener("dragleave", () => place.classList.remove("over"));
  place.addEventListener("drop", (event) => {
    event.preventDefault();
    place.classList.remove("over");
    work(event.dataTransfer);
  });
}

function dataPage() {
  const place = $("#drop");
  if (!place) return;
  const { project } = place.dataset;
  dropZone(place, guarded(async (transfer) => uploadAll(project, await dropped(transfer))));
  const chosen = guarded((event) => uploadAll(project, [...event.target.files].map((file) => {
    const parts = (file.webkitRelativePath || file.name).split("/");
    return { file, name: (parts.length > 2 ? parts.slice(1) : parts).join("/") };
  }).filter(({ name }) => !name.split("/").some((part) => part.startsWith(".")))));
  $("#files").addEventListener("change", chosen);
  $("#folder").addEventListener("change", chosen);
}

// --- labels ---------------------------------------------------------------------------------------------------

function pairsPart() {
  const place = $("#pairs");
  if (!place) return;
  place.addEventListener("click", guarded(async (event) => {
    const { file } = event.target.dataset;
    if (!file) return;
    await send(`/p/${encodeURIComponent(place.dataset.project)}/labels`, { action: "delete", files: [file] });
    event.target.closest(".pair").hidden = true;
  }));
}

function galleryPage() {
  const gallery = $("#gallery"), bar = $("#edit");
  if (!gallery || !bar) return;
  let last = null;
  const selected = () => $$('.tile[aria-checked="true"]', gallery);
  const mark = (tile, on) => tile.setAttribute("aria-checked", String(on));
  const choose = (tile, range) => {
    const tiles = $$(".tile", gallery);
    if (range && last) {
      const [a, b] = [tiles.indexOf(last), tiles.indexOf(tile)].sort((x, y) => x - y);
      tiles.slice(a, b + 1).forEach((one) => mark(one, true));
    } else {
      mark(tile, tile.getAttribute("aria-checked") !== "true");
    }
    last = tile;
    $("#count").textContent = selected().length;
  };
  gallery.addEventListener("click", (event) => {
    const tile = event.target.closest(".tile");
    if (tile && !event.target.closest("audio, video")) choose(tile, event.shiftKey);
  });
  gallery.addEventListener("keydown", (event) => {
    if ((event.key === " " || event.key === "Enter") && event.target.classList.contains("tile")) {
      event.preventDefault();
      choose(event.target, event.shiftKey);
    }
  });
  $$(".chip[hx-get]").forEach((chip) => chip.addEventListener("click", () => {
    $$(".chip[hx-get]").forEach((one) => one.setAttribute("aria-selected", String(one === chip)));
  }));
  bar.addEventListener("click", guarded(async (event) => {
    const { action } = event.target.dataset;
    if (!action) return;
    const current = $('.chip[aria-selected="true"]');
    const value = { action, files: selected().map((tile) => tile.dataset.file), label: $("#to-label").value };
    if (action === "rename") value.old = current.dataset.label || "";
    await send(`/p/${encodeURIComponent(bar.dataset.project)}/labels`, value);
    location.reload();
  }));
}

// --- camera and microphone --------------------------------------------------------------------------------------

// A camera or a microphone, or a sentence that says why there is none.
async function openDevice(wanted) {
  const texts = document.body.dataset;
  if (!navigator.mediaDevices) throw new Error(texts.noDevice);
  try {
    return await navigator.mediaDevices.getUserMedia(wanted);
  } catch (error) {
    throw new Error(error.name === "NotAllowedError" ? texts.deviceRefused : texts.noDevice);
  }
}

async function openCamera(video) {
  video.srcObject = await openDevice({ video: { width: 640, height: 480 } });
  video.hidden = false;
  await video.play();
}

function closeCamera(video) {
  if (video.srcObject) video.srcObject.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
  video.hidden = true;
}

// What the camera sees, at most `width` pixels wide.
async function photo(video, width = Infinity) {
  const canvas = document.createElement("canvas");
  const scale = Math.min(1, width / video.videoWidth);
  canvas.width = Math.round(scale * video.videoWidth);
  canvas.height = Math.round(scale * video.videoHeight);
  canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.92));
}

// Recordings are written as WAV: every model here reads it.
async function recorder() {
  const stream = await openDevice({ audio: true });
  const media = new MediaRecorder(stream), parts = [];
  media.addEventListener("dataavailable", (event) => parts.push(event.data));
  media.start();
  return async () => {
    await new Promise((done) => { media.addEventListener("stop", done); media.stop(); });
    stream.getTracks().forEach((track) => track.stop());
    const context = new AudioContext();
    const decoded = await context.decodeAudioData(await new Blob(parts).arrayBuffer());
    await context.close();
    return wav(decoded.getChannelData(0), decoded.sampleRate);
  };
}

function wav(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (at, value) => [...value].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true); view.setUint16(32, 2, true);
  view.setUint16(34, 16, true); text(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((v, i) => view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, v)) * 32767, true));
  return new Blob([view], { type: "audio/wav" });
}

function toggleRecording(button, work) {
  let stop = null;
  button.addEventListener("click", guarded(async () => {
    if (!stop) {
      stop = await recorder();
      button.textContent = button.dataset.stop;
    } else {
      const blob = await stop();
      stop = null;
      button.textContent = button.dataset.start;
      await work(blob);
    }
  }));
}

function recordPage() {
  const place = $("#record");
  if (!place) return;
  const { project } = place.dataset, video = $("#video");
  const name = (ending) => `${$("#record-label").value.trim() || "label"}/${Date.now()}.${ending}`;
  const keep = async (blob, ending) => {
    const path = name(ending);
    await upload(project, blob, path, () => {});
    $("#taken").textContent = path;
  };
  $("#camera").addEventListener("click", guarded(async () => { await openCamera(video); $("#shot").hidden = false; }));
  $("#shot").addEventListener("click", guarded(async () => keep(await photo(video), "jpg")));
  toggleRecording($("#microphone"), (blob) => keep(blob, "wav"));
}

// --- results --------------------------------------------------------------------------------------------------

function resultPage() {
  const slider = $("#threshold");
  if (!slider) return;
  const points = JSON.parse($("#points").textContent);
  slider.addEventListener("input", () => {
    const least = slider.value / 100;
    const answered = points.filter(([chance]) => chance >= least);
    const right = answered.reduce((sum, [, good]) => sum + good, 0);
    $("#threshold-value").textContent = `${slider.value} %`;
    $("#covered").textContent = (100 * answered.length / points.length).toFixed(1);
    $("#accuracy").textContent = answered.length ? (100 * right / answered.length).toFixed(1) : "–";
  });
  $$("[data-filter]").forEach((button) => button.addEventListener("click", () => {
    const { filter } = button.dataset;
    $$(".chip[data-filter]").forEach((one) => one.setAttribute("aria-pressed", String(one === button)));
    $$("#answers .tile").forEach((tile) => {
      tile.hidden = Boolean(filter) && !tile.classList.contains(filter) && tile.dataset.pair !== filter;
    });
    if (!button.classList.contains("chip")) $("#filters").scrollIntoView();
  }));
  document.body.addEventListener("htmx:beforeRequest", (event) => {
    if (event.detail.target.id !== "why-answer") return;
    $("#why-answer").textContent = "…";
    $("#why").showModal();
  });
}

// --- use ------------------------------------------------------------------------------------------------------

function usePage() {
  const place = $("#use");
  if (!place) return;
  const { base } = place.dataset;
  let asked = null; // what the last question was, to be asked why
  const post = (path) => ask(`${base}/${path}`, !(asked instanceof Blob)
    ? { method: "POST", body: JSON.stringify(asked), headers: { "content-type": "application/json" } }
    : { method: "POST", body: asked, headers: { "content-type": "application/octet-stream" } });
  const show = async (question, brief = false) => {
    asked = question;
    $("#answer").innerHTML = await (await post(brief ? "ask?brief=true" : "ask")).text();
  };
  const askFile = guarded(show);
  $("#answer")?.addEventListener("click", guarded(async (event) => {
    const { why } = event.target.dataset;
    if (why === undefined) return;
    event.target.disabled = true;
    $("#why-answer").innerHTML = await (await post(`why?answer=${encodeURIComponent(why)}`)).text();
  }));
  if ($("#ask")) askZone(base, show, askFile);
  $$(".make").forEach((part) => makePart(part, base));
  if ($("#chat")) chatPart($("#chat"), base);
  if ($("#find")) findPart($("#find"), base);
  $$(".lines").forEach((part) => linesPart(part, base));
}

function askZone(base, show, askFile) {
  dropZone($("#ask"), async (transfer) => { const [first] = await dropped(transfer); if (first) askFile(first.file); });
  $("#ask-file").addEventListener("change", (event) => askFile(event.target.files[0]));
  $("#ask-text").addEventListener("submit", guarded(async (event) => {
    event.preventDefault();
    await show({ text: event.target.elements.text.value });
  }));
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files][0];
    if (file && !event.target.closest("#chat")) askFile(file);
  });
  const camera = $("#live-camera"), video = $("#live-video");
  if (camera) {
    let on = false;
    camera.addEventListener("click", guarded(async () => {
      on = !on;
      if (!on) { closeCamera(video); return; }
      await openCamera(video);
      let last = null;
      try {
        for (let taken = await photo(video, LIVE); on; taken = await photo(video, LIVE)) {
          last = taken;
          await show(taken, true); // the next image is taken when the last one is answered
        }
        if (last) await show(last); // all that there is to say about the last one
      } finally {
        on = false;
        closeCamera(video);
      }
    }));
  }
  if ($("#live-microphone")) toggleRecording($("#live-microphone"), askFile);
}

function makePart(part, base) {
  const { verb } = part.dataset;
  let seed = 0;
  $("form", part).addEventListener("submit", guarded(async (event) => {
    event.preventDefault();
    const text = event.target.elements.text.value;
    const { made } = await (await send(`${base}/make`, { verb, text, n: 4, seed: seed++ })).json();
    for (const address of made) {
      const figure = document.createElement("figure");
      figure.className = "tile static";
      const medium = document.createElement(verb === "draw" ? "img" : "audio");
      if (verb === "draw") { medium.alt = text; medium.className = "pixels"; } else { medium.controls = true; }
      medium.src = address;
      const caption = document.createElement("figcaption");
      caption.textContent = text;
      figure.append(medium, caption);
      $(".made", part).prepend(figure);
    }
  }));
}

function chatPart(part, base) {
  const messages = [], composer = $("textarea", part), texts = part.dataset, waiting = $("#chat-attached");
  let going = null, seed = 0, attached = []; // of the next message: {name, part}
  const button = (text, work) => {
    const made = element("button", { type: "button", className: "plain small", textContent: text });
    made.addEventListener("click", guarded(work));
    return made;
  };
  const showAttached = () => {
    waiting.replaceChildren(...attached.map((one) => element("span", { className: "attached" }, medium(one.part),
      button(`${one.name} ✕`, () => { attached = attached.filter((other) => other !== one); showAttached(); }))));
  };
  const attach = guarded(async (file) => {
    attached.push({ name: file.name || texts.attach, part: await filePart(file) });
    showAttached();
  });
  // A message of one's own is edited by going back to it; a reply is copied.
  const line = ({ role, content }, at) => {
    const shown = element("p", { className: role });
    const parts = typeof content === "string" ? [{ type: "text", text: content }] : content;
    const text = parts.filter(({ type }) => type === "text").map((one) => one.text).join("\n");
    shown.append(...parts.filter(({ type }) => type !== "text").map(medium), text);
    if (role === "user") {
      shown.append(button(texts.edit, () => {
        going?.abort();
        composer.value = text;
        attached = parts.filter(({ type }) => type !== "text").map((one) => ({ name: texts.attach, part: one }));
        messages.length = at;
        draw();
        showAttached();
        composer.focus();
      }));
    } else if (content) {
      shown.append(button(texts.copy, () => navigator.clipboard.writeText(content)));
    }
    return shown;
  };
  const draw = () => {
    const talk = $(".talk", part);
    talk.replaceChildren(...messages.map(line));
    talk.scrollTop = talk.scrollHeight;
    $("#again").disabled = Boolean(going) || !messages.length;
    $("#chat-new").disabled = !messages.length;
    $("#chat-stop").hidden = !going;
  };
  const answer = guarded(async () => {
    const asked = [...messages], reply = { role: "assistant", content: "" };
    going = new AbortController();
    messages.push(reply);
    draw();
    const shown = $(".talk p:last-child", part);
    shown.classList.add("busy");
    try {
      const headers = { "content-type": "application/json" };
      const body = JSON.stringify({ messages: asked, seed: seed++ });
      const { body: stream } = await ask(`${base}/chat`, { method: "POST", body, headers, signal: going.signal });
      const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
      for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
        reply.content += piece.value;
        shown.textContent = reply.content;
      }
      reply.content = reply.content.trim() || "…";
    } catch (error) {
      if (error.name !== "AbortError") { messages.pop(); throw error; }
    } finally {
      going = null;
      draw();
    }
  });
  $("form", part).addEventListener("submit", (event) => {
    event.preventDefault();
    const text = composer.value;
    if (going || (!text.trim() && !attached.length)) return;
    const parts = [...attached.map((one) => one.part), ...(text.trim() ? [{ type: "text", text }] : [])];
    messages.push({ role: "user", content: attached.length ? parts : text });
    attached = [];
    showAttached();
    event.target.reset();
    answer();
  });
  $("#chat-stop").addEventListener("click", () => going?.abort());
  $("#chat-new").addEventListener("click", () => { going?.abort(); messages.length = 0; draw(); composer.focus(); });
  composer.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey) { event.preventDefault(); $("form", part).requestSubmit(); }
  });
  $("#again").addEventListener("click", () => {
    while (messages.at(-1)?.role === "assistant") messages.pop();
    if (messages.length && !going) answer();
  });
  if (!$("#chat-file", part)) return; // this model reads texts alone
  $("#chat-file").addEventListener("change", (event) => { [...event.target.files].forEach(attach); event.target.value = ""; });
  dropZone(part, guarded(async (transfer) => (await dropped(transfer)).forEach(({ file }) => attach(file))));
  composer.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) event.preventDefault();
    [...event.clipboardData.files].forEach(attach);
  });
}

function findPart(part, base) {
  const show = async (options) => {
    $("#found").innerHTML = await (await ask(`${base}/find`, { method: "POST", ...options })).text();
  };
  $("form", part).addEventListener("submit", guarded(async (event) => {
    event.preventDefault();
    const text = event.target.elements.text.value;
    await show({ body: JSON.stringify({ text }), headers: { "content-type": "application/json" } });
  }));
  $("#find-file")?.addEventListener("change", guarded(async (event) => {
    await show({ body: event.target.files[0], headers: { "content-type": "application/octet-stream" } });
  }));
}

function linesPart(part, base) {
  const box = $("textarea", part);
  $$("[data-line]", part).forEach((chip) => chip.addEventListener("click", () => {
    box.value = [box.value.trim(), chip.dataset.line].filter(Boolean).join("\n");
  }));
  $("form", part).addEventListener("submit", guarded(async (event) => {
    event.preventDefault();
    const text = event.target.elements.text.value;
    const { lines } = await (await send(`${base}/lines/${part.dataset.part}`, { text })).json();
    $("ol", part).replaceChildren(...lines.map((line) => Object.assign(document.createElement("li"), { textContent: line })));
  }));
}

// --- hand over ------------------------------------------------------------------------------------------------

function handOverPage() {
  const place = $("#exports"), server = $("#server");
  if (!place) return;
  place.addEventListener("click", guarded(async (event) => {
    const { form } = event.target.dataset;
    if (!form) return;
    const button = event.target, told = $("output", button.parentElement);
    button.disabled = true;
    told.textContent = "…";
    try {
      const { file, bytes } = await (await send(`${place.dataset.base}/export`, { form })).json();
      told.textContent = `${file}, ${(bytes / 1e6).toFixed(1)} MB`;
      $("a", button.parentElement).hidden = false;
    } catch (error) {
      told.textContent = error.message;
    } finally {
      button.disabled = false;
    }
  }));
  $("#server-start")?.addEventListener("click", guarded(async () => {
    const { address, key } = await (await send(`${server.dataset.base}/serve`, {})).json();
    $("#server-key").textContent = `${address}\n${key}`;
    $("#server-told").hidden = false;
    $("#server-start").disabled = true;
    $$("[data-curl]").forEach((one) => {
      one.textContent = one.textContent.replace(/http:\/\/127[^/]*/, address).replace("KEY", key);
    });
  }));
  $("#server-stop")?.addEventListener("click", guarded(async () => {
    await send(server.dataset.stop, {});
    location.reload();
  }));
}

// --- labels to look at ----------------------------------------------------------------------------------------

function reviewPart() {
  const place = $("#review");
  if (!place) return;
  place.addEventListener("click", guarded(async (event) => {
    const { file, label } = event.target.dataset;
    if (!file) return;
    const tile = event.target.closest(".tile"), written = $("input", tile)?.value.trim();
    if (event.target.dataset.keep === undefined) {
      const value = { action: "move", files: [file], label: written || label };
      await send(`/p/${encodeURIComponent(place.dataset.project)}/labels`, value);
    }
    tile.hidden = true;
  }));
}

// --- everywhere -----------------------------------------------------------------------------------------------

function everywhere() {
  $("#theme").addEventListener("click", () => {
    const root = document.documentElement;
    const dark = root.dataset.theme === "dark" || (!root.dataset.theme && matchMedia("(prefers-color-scheme:dark)").matches);
    root.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("theme", root.dataset.theme);
  });
  $$(".copy").forEach((button) => button.addEventListener("click", guarded(async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = button.dataset.done;
  })));
  $$("form[method=post]").forEach((form) => form.addEventListener("submit", guarded(async (event) => {
    event.preventDefault();
    const answer = await ask(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) });
    location.href = answer.url;
  })));
  document.body.addEventListener("htmx:responseError", (event) => {
    let text = event.detail.xhr.statusText;
    try { text = JSON.parse(event.detail.xhr.responseText).error; } catch { /* the status says it */ }
    tell(text);
  });
}

everywhere();
dataPage();
galleryPage();
pairsPart();
recordPage();
resultPage();
usePage();
handOverPage();
reviewPart();
