"use strict";
// Classifies images with the weights below it in the page: plain JavaScript, nothing is loaded from elsewhere.

const FACTS = JSON.parse(document.getElementById("facts").textContent);

function readWeights() {
  const text = atob(document.getElementById("weights").textContent.trim());
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Float32Array(bytes.buffer);
}

const WEIGHTS = readWeights();

// --- images ---------------------------------------------------------------------------------------------------

// RGBA pixels on the ground that the model knows, as rows of 1 or 3 channels.
function opaque(pixels, count, channels, ground) {
  const out = new Uint8ClampedArray(count * channels);
  for (let i = 0; i < count; i++) {
    const share = pixels[4 * i + 3] / 255;
    const [r, g, b] = [0, 1, 2].map((c) => Math.round(pixels[4 * i + c] * share + ground * (1 - share)));
    if (channels === 1) out[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else { out[3 * i] = r; out[3 * i + 1] = g; out[3 * i + 2] = b; }
  }
  return out;
}

// The square that the model sees of an image: its middle, or the whole with a border.
function squared(pixels, width, height, channels) {
  if (width === height || FACTS.fit === "stretch") return { pixels, width, height };
  const side = FACTS.fit === "crop" ? Math.min(width, height) : Math.max(width, height);
  const left = Math.floor((width - side) / 2), top = Math.floor((height - side) / 2);
  const out = new Uint8ClampedArray(side * side * channels).fill(FACTS.background);
  for (let y = 0; y < side; y++) {
    const from = y + top;
    if (from < 0 || from >= height) continue;
    for (let x = 0; x < side; x++) {
      const at = x + left;
      if (at < 0 || at >= width) continue;
      for (let c = 0; c < channels; c++) out[(y * side + x) * channels + c] = pixels[(from * width + at) * channels + c];
    }
  }
  return { pixels: out, width: side, height: side };
}

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const lanczos = (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0);

// The weights by which each of `into` places is the sum of those of `from`.
function windows(from, into) {
  const scale = from / into, wide = Math.max(scale, 1), reach = 3 * wide, found = [];
  for (let i = 0; i < into; i++) {
    const middle = (i + 0.5) * scale;
    const low = Math.max(Math.floor(middle - reach + 0.5), 0), high = Math.min(Math.floor(middle + reach + 0.5), from);
    const shares = [];
    let sum = 0;
    for (let k = low; k < high; k++) { const share = lanczos((k - middle + 0.5) / wide); shares.push(share); sum += share; }
    found.push({ low, shares: shares.map((share) => share / sum) });
  }
  return found;
}

function resized(pixels, width, height, channels, size) {
  if (width === size && height === size) return pixels;
  const across = new Uint8ClampedArray(height * size * channels), columns = windows(width, size);
  for (let y = 0; y < height; y++) for (let x = 0; x < size; x++) for (let c = 0; c < channels; c++) {
    const { low, shares } = columns[x];
    let sum = 0;
    for (let k = 0; k < shares.length; k++) sum += shares[k] * pixels[(y * width + low + k) * channels + c];
    across[(y * size + x) * channels + c] = Math.round(sum);
  }
  const out = new Uint8ClampedArray(size * size * channels), rows = windows(height, size);
  for (let y = 0; y < size; y++) for (let x = 0; x < size; x++) for (let c = 0; c < channels; c++) {
    const { low, shares } = rows[y];
    let sum = 0;
    for (let k = 0; k < shares.length; k++) sum += shares[k] * across[((low + k) * size + x) * channels + c];
    out[(y * size + x) * channels + c] = Math.round(sum);
  }
  return out;
}

function sample(rgba, width, height) {
  const channels = FACTS.channels;
  const square = squared(opaque(rgba, width * height, channels, FACTS.background), width, height, channels);
  return resized(square.pixels, square.width, square.height, channels, FACTS.size);
}

// --- the network ----------------------------------------------------------------------------------------------

const silu = (map) => { for (let i = 0; i < map.data.length; i++) map.data[i] /= 1 + Math.exp(-map.data[i]); return map; };

function convolution({ data, side, channels }, { into, stride }, weights, at) {
  const out = Math.floor((side - 1) / stride) + 1, found = new Float32Array(out * out * into), sums = new Float32Array(into);
  const bias = at + 9 * channels * into;
  for (let y = 0; y < out; y++) for (let x = 0; x < out; x++) {
    for (let o = 0; o < into; o++) sums[o] = weights[bias + o];
    for (let ky = 0; ky < 3; ky++) {
      const row = y * stride + ky - 1;
      if (row < 0 || row >= side) continue;
      for (let kx = 0; kx < 3; kx++) {
        const column = x * stride + kx - 1;
        if (column < 0 || column >= side) continue;
        const from = (row * side + column) * channels;
        let place = at + (ky * 3 + kx) * channels * into;
        for (let i = 0; i < channels; i++) {
          const value = data[from + i];
          for (let o = 0; o < into; o++) sums[o] += value * weights[place + o];
          place += into;
        }
      }
    }
    found.set(sums, (y * out + x) * into);
  }
  return [{ data: found, side: out, channels: into }, bias + into];
}

function pool({ data, side, channels }) {
  const out = Math.ceil(side / 2), found = new Float32Array(out * out * channels).fill(-Infinity);
  for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) for (let c = 0; c < channels; c++) {
    const to = ((y >> 1) * out + (x >> 1)) * channels + c;
    found[to] = Math.max(found[to], data[(y * side + x) * channels + c]);
  }
  return { data: found, side: out, channels };
}

// What the head reads: the mean and the largest value of each channel.
function pooled({ data, side, channels }) {
  const seen = new Float32Array(2 * channels).fill(0, 0, channels).fill(-Infinity, channels);
  for (let i = 0; i < side * side; i++) for (let c = 0; c < channels; c++) {
    const value = data[i * channels + c];
    seen[c] += value / (side * side);
    seen[channels + c] = Math.max(seen[channels + c], value);
  }
  return seen;
}

function head(seen, { into }, weights, at) {
  const found = Float32Array.from({ length: into }, (_, o) => weights[at + seen.length * into + o]);
  seen.forEach((value, i) => { for (let o = 0; o < into; o++) found[o] += value * weights[at + i * into + o]; });
  return { found, after: at + (seen.length + 1) * into };
}

// Rows (count, size) of the weights from a place on, times a vector: (count) sums, or with `across` (size) ones.
function times(vector, count, size, at, across) {
  const found = new Float32Array(across ? size : count);
  for (let i = 0; i < count; i++) for (let k = 0; k < size; k++) {
    found[across ? k : i] += vector[across ? i : k] * WEIGHTS[at + i * size + k];
  }
  return found;
}

const norm = (vector) => vector.reduce((sum, value) => sum + value * value, 0);

// How unlike all training images what the head read is: the distance to the nearest class, what lies outside the space
// in which training images vary, the direction of the nearest one; see plait.classifiers.novelty.
function novelty(seen, at, facts) {
  const { features, dimensions, classes, records } = facts;
  const centred = seen.map((value, i) => value - WEIGHTS[at + i]);
  const basis = at + features, whitening = basis + features * dimensions;
  const centres = whitening + dimensions * dimensions, nearby = centres + classes * dimensions;
  const inside = times(centred, features, dimensions, basis, true);
  const white = times(inside, dimensions, dimensions, whitening, true);
  let nearest = Infinity, alike = -Infinity;
  for (let c = 0; c < classes; c++) {
    let distance = 0;
    for (let k = 0; k < dimensions; k++) distance += (white[k] - WEIGHTS[centres + c * dimensions + k]) ** 2;
    nearest = Math.min(nearest, distance);
  }
  const length = Math.max(Math.sqrt(norm(white)), 1e-9);
  for (const product of times(white, records, dimensions, nearby, false)) alike = Math.max(alike, product / length);
  const measures = [Math.max(nearest, 1e-9), Math.max(norm(centred) - norm(inside), 1e-9), Math.max(1 - alike, 1e-3)];
  return measures.reduce((sum, value, i) => {
    const standard = (Math.log(value) - facts.centre[i]) / facts.spread[i];
    return sum + facts.weights[i] * Math.min(Math.max(standard, -facts.clip), facts.clip);
  }, 0);
}

// { found: logits of the labels, seen: what the head read, after: where the weights of the network end }
function logits(pixels) {
  let map = { data: Float32Array.from(pixels, (value) => value / 64 - 2), side: FACTS.size, channels: FACTS.channels }, at = 0;
  for (const layer of FACTS.layers) {
    if (layer.step === "convolution") [map, at] = convolution(map, layer, WEIGHTS, at);
    else if (layer.step === "silu") silu(map);
    else if (layer.step === "pool") map = pool(map);
    else if (layer.step === "residual") {
      let inner;
      [inner, at] = convolution(map, layer.parts[0], WEIGHTS, at);
      [inner, at] = convolution(silu(inner), layer.parts[1], WEIGHTS, at);
      for (let i = 0; i < map.data.length; i++) map.data[i] += inner.data[i];
      silu(map);
    } else {
      const seen = pooled(map);
      return { ...head(seen, layer, WEIGHTS, at), seen };
    }
  }
  throw new Error("The page has no head.");
}

function mirrored(pixels) {
  const { size, channels } = FACTS, out = new Uint8ClampedArray(pixels.length);
  for (let y = 0; y < size; y++) for (let x = 0; x < size; x++) for (let c = 0; c < channels; c++) {
    out[(y * size + x) * channels + c] = pixels[(y * size + size - 1 - x) * channels + c];
  }
  return out;
}

function logSoftmax(values) {
  const most = Math.max(...values), sum = values.reduce((total, value) => total + Math.exp(value - most), 0);
  return Array.from(values, (value) => value - most - Math.log(sum));
}

// [{ label, probability }], the likeliest first, and whether none of the labels fits.
function classify(pixels) {
  const views = FACTS.mirrored ? [pixels, mirrored(pixels)] : [pixels];
  const outputs = views.map(logits);
  const sums = outputs.map(({ found }) => found).reduce((a, b) => a.map((value, i) => value + b[i]));
  const scores = logSoftmax(Array.from(sums, (value) => value / views.length));
  const chances = logSoftmax(scores.map((value) => value * FACTS.factor)).map(Math.exp);
  const answers = FACTS.labels.map((label, i) => ({ label, probability: chances[i] }));
  answers.sort((a, b) => b.probability - a.probability);
  return { answers, none: isUnlike(Math.max(...scores), outputs[0]) };
}

// Whether an image is less familiar than nearly all of those that the page was calibrated on.
function isUnlike(surest, { seen, after }) {
  const facts = FACTS.familiarity;
  if (!facts) return false;
  const strange = facts.novelty ? novelty(seen, after, facts.novelty) : 0;
  return (surest - facts.centre) / facts.spread - strange < facts.least;
}

// --- the page -------------------------------------------------------------------------------------------------

const ZH = navigator.language.startsWith("zh");
const say = (en, zh) => (ZH ? zh : en);
const part = (id) => document.getElementById(id);

function show(source, width, height) {
  const most = 1600 / Math.max(width, height), share = Math.min(most, 1);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(Math.round(width * share), 1);
  canvas.height = Math.max(Math.round(height * share), 1);
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  pen.drawImage(source, 0, 0, canvas.width, canvas.height);
  const { data } = pen.getImageData(0, 0, canvas.width, canvas.height);
  const { answers, none } = classify(sample(data, canvas.width, canvas.height));
  part("answer").textContent = none ? say("None of these", "都不是") : answers[0].label;
  part("bars").replaceChildren(...answers.slice(0, 5).map(({ label, probability }) => {
    const row = document.createElement("tr"), meter = document.createElement("meter");
    meter.value = probability;
    for (const inside of [label, meter, `${(100 * probability).toFixed(1)} %`]) {
      const cell = document.createElement("td");
      cell.append(inside);
      row.append(cell);
    }
    return row;
  }));
}

async function open(file) {
  if (!file) return;
  const image = part("image");
  image.src = URL.createObjectURL(file);
  try { await image.decode(); } catch {
    part("answer").textContent = say(`${file.name} is no image that this browser reads.`, `浏览器无法读取图片 ${file.name}。`);
    part("bars").replaceChildren();
    image.hidden = true;
    return;
  }
  image.hidden = false;
  show(image, image.naturalWidth, image.naturalHeight);
}

async function live() {
  const video = part("video");
  if (video.srcObject) {
    video.srcObject.getTracks().forEach((track) => track.stop());
    video.srcObject = null;
    video.hidden = true;
    return;
  }
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    part("answer").textContent = say(`No camera: ${error.message}. Choose a photo in its place.`, `没有摄像头：${error.message}。请选择照片。`);
    return;
  }
  video.hidden = false;
  await video.play();
  const step = () => {
    if (!video.srcObject) return;
    if (video.videoWidth) show(video, video.videoWidth, video.videoHeight);
    requestAnimationFrame(step);
  };
  step();
}

if (ZH) {
  document.documentElement.lang = "zh-Hans";
  document.querySelectorAll("[data-zh]").forEach((one) => { one.textContent = one.dataset.zh; });
}
part("file").addEventListener("change", (event) => open(event.target.files[0]));
for (const kind of ["dragover", "drop"]) document.addEventListener(kind, (event) => {
  event.preventDefault();
  if (kind === "drop") open(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => open(event.clipboardData.files[0]));
part("camera").hidden = !navigator.mediaDevices;
part("camera").addEventListener("click", live);
