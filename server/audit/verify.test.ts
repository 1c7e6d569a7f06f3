import { generateKeyPairSync, sign } from 'node:crypto'
import { expect, test } from 'vitest'
import { emptyLog, extend, type LogHead } from './chain.ts'
import { checkpointText, readCheckpoint, signedCheckpoint, verifyCheckpoint } from './checkpoint.ts'
import type { AuditEntry, SequencedEntry } from './entry.ts'
import { ExportError, exportFooter, exportHeader, exportLine, readExport } from './export.ts'
import { rootOf } from './tree.ts'
import { verifyLog, type LogVerdict } from './verify.ts'

const keyPair = () => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  return { privateKey, spki: new Uint8Array(publicKey.export({ type: 'spki', format: 'der' })) }
}
const signer = keyPair()

const entry = (at: number): AuditEntry => ({
  at,
  caller: 'operator:alice',
  from: '192.0.2.0/24',
  action: 'device.revoke',
  subject: `d${at}`,
  outcome: at % 3 === 0 ? 'refused' : 'done',
  code: at % 3 === 0 ? 'forbidden' : null,
  detail: `line ${at} \n "quoted" ä 🔑`,
})

/** A log of `size` entries; with `changed` its entries from 1 on are others. */
const logOf = (size: number, changed: (entry: AuditEntry, at: number) => AuditEntry = (one) => one) => {
  let head: LogHead = emptyLog
  const entries: SequencedEntry[] = []
  for (let at = 1; at <= size; at++) {
    const extended = extend(head, changed(entry(at), at))
    head = extended.head
    entries.push(extended.sequenced)
  }
  return { entries, head }
}
const noteOf = (head: LogHead, by = signer, origin = 'fleetkey/plant'): string => {
  const tree = { origin, size: head.tree.size, root: rootOf(head.tree) }
  return signedCheckpoint(tree, { spki: by.spki, signature: sign('sha256', Buffer.from(checkpointText(tree)), by.privateKey) })
}

const size = 13
const log = logOf(size)
const checkpoint = noteOf(log.head)
const kept = [noteOf(logOf(0).head), noteOf(logOf(5).head), noteOf(logOf(8).head), checkpoint]

/** Through the export and back, as an auditor gets it. */
const judge = (entries: readonly SequencedEntry[], of: { checkpoint?: string; kept?: readonly string[]; spki?: Uint8Array } = {}): LogVerdict => {
  const content = exportHeader + entries.map(exportLine).join('') + exportFooter(of.checkpoint ?? checkpoint)
  const read = readExport(content)
  return verifyLog(read.entries, { spki: of.spki ?? signer.spki, checkpoint: read.checkpoint, kept: of.kept ?? [] })
}

test('an untouched log is authentic, alone and against kept checkpoints', () => {
  expect(judge(log.entries)).toEqual({ ok: true, entries: size, sequence: null, what: 'fleetkey/plant: 13 entries' })
  expect(judge(log.entries, { kept })).toMatchObject({ ok: true, entries: size })
  expect(judge([], { checkpoint: noteOf(emptyLog) })).toMatchObject({ ok: true, entries: 0 })
})

const fields: readonly [keyof SequencedEntry, unknown][] = [
  ['sequence', 99],
  ['at', 4],
  ['caller', 'operator:mallory'],
  ['from', ''],
  ['action', 'device.show'],
  ['subject', 'd0'],
  ['outcome', 'refused'],
  ['code', 'x'],
  ['detail', ''],
  ['previous', new Uint8Array(32)],
  ['chain', new Uint8Array(32)],
]
const edits = fields.flatMap(([field, value]) => [2, 7, size].map((at) => [field, at, value] as const))
test.each(edits)('edit of %s in entry %i is found there', (field, at, value) => {
  const changed = log.entries.map((one) => (one.sequence === at ? ({ ...one, [field]: value } as SequencedEntry) : one))
  expect(judge(changed)).toMatchObject({ ok: false, sequence: at })
})

test.each(Array.from({ length: size }, (_, at) => at))('dropping, doubling, swapping at index %i is found', (at) => {
  const { entries } = log
  const last = at === size - 1
  expect(judge(entries.toSpliced(at, 1))).toMatchObject({ ok: false, sequence: at + 1, what: expect.stringMatching(last ? /truncated/ : /missing/) as string })
  expect(judge(entries.toSpliced(at, 0, entries[at] as SequencedEntry))).toMatchObject({ ok: false, sequence: at + 2 })
  const swapped = last
    ? entries.toSpliced(0, 1, entries[at] as SequencedEntry)
    : entries.toSpliced(at, 2, entries[at + 1] as SequencedEntry, entries[at] as SequencedEntry)
  expect(judge(swapped)).toMatchObject({ ok: false })
})

test.each(Array.from({ length: size }, (_, at) => at))('truncation to %i entries is found', (length) => {
  expect(judge(log.entries.slice(0, length))).toMatchObject({ ok: false, sequence: length + 1, what: expect.stringContaining('truncated') as string })
})

test('a log written anew with right chains does not match its checkpoint', () => {
  for (let at = 1; at <= size; at++) {
    const forged = logOf(size, (one, index) => (index === at ? { ...one, caller: 'operator:mallory' } : one))
    expect(judge(forged.entries)).toMatchObject({ ok: false, sequence: null })
  }
  expect(judge(logOf(size + 1).entries)).toMatchObject({ ok: false, sequence: size + 1 })
})

test('even the holder of the signing key cannot rewrite or cut what a kept checkpoint covers', () => {
  const forged = logOf(size, (one, index) => (index === 4 ? { ...one, detail: '' } : one))
  expect(judge(forged.entries, { checkpoint: noteOf(forged.head) })).toMatchObject({ ok: true })
  expect(judge(forged.entries, { checkpoint: noteOf(forged.head), kept })).toMatchObject({
    ok: false,
    what: 'entries up to 5 are not those that a kept checkpoint covers',
  })
  const shorter = logOf(7)
  expect(judge(shorter.entries, { checkpoint: noteOf(shorter.head), kept })).toMatchObject({ ok: false, what: expect.stringContaining('truncated') as string })
  expect(judge([], { checkpoint: noteOf(emptyLog), kept: [checkpoint] })).toMatchObject({ ok: false })
})

test('checkpoints of another key, another log, or damaged are refused', () => {
  const other = keyPair()
  expect(judge(log.entries, { spki: other.spki })).toMatchObject({ ok: false, sequence: null })
  expect(judge(log.entries, { checkpoint: noteOf(log.head, other) })).toMatchObject({ ok: false })
  expect(judge(log.entries, { kept: [noteOf(log.head, other)] })).toMatchObject({ ok: false })
  expect(judge(log.entries, { kept: [noteOf(log.head, signer, 'fleetkey/other')] })).toMatchObject({
    ok: false,
    what: expect.stringContaining('another log') as string,
  })
  expect(judge(log.entries, { kept: ['', 'x'] })).toMatchObject({ ok: false })
})

test('checkpoint: C2SP text, own signature among others, nothing changed', () => {
  const lines = checkpoint.split('\n')
  expect(lines).toEqual([
    'fleetkey/plant',
    '13',
    Buffer.from(rootOf(log.head.tree)).toString('base64'),
    '',
    expect.stringMatching(/^— fleetkey\/plant [A-Za-z0-9+/]+=*$/),
    '',
  ])
  const witnessed = `${checkpoint}— witness.example AAAAAAAA\n`
  expect(verifyCheckpoint(witnessed, signer.spki)).toEqual({ origin: 'fleetkey/plant', size, root: rootOf(log.head.tree) })
  for (const changed of [
    checkpoint.replace('13', '12'),
    checkpoint.replace('plant', 'plan'),
    checkpoint.replace('\n13\n', '\n013\n'),
    checkpoint.slice(0, -1),
    checkpoint.replace('\n\n', '\n\n\n'),
    checkpoint.replace('\n\n', '\nextension\n\n'),
    checkpoint.slice(0, checkpoint.indexOf('—')),
    `${checkpoint}${' '.repeat(10_000)}`,
  ])
    expect([changed, verifyCheckpoint(changed, signer.spki)]).toEqual([changed, undefined])
  expect(readCheckpoint(checkpoint)).toMatchObject({ size })
  expect(() => checkpointText({ origin: 'a b', size: 0, root: new Uint8Array(32) })).toThrow(RangeError)
})

const line = exportLine(log.entries[0] as SequencedEntry)
test.each([
  ['nothing', '', 1],
  ['no header', line + exportFooter(checkpoint), 1],
  ['no footer', exportHeader + line, 2],
  ['half a footer', exportHeader + line + exportFooter(checkpoint).slice(0, -4), 3],
  ['a line that is not JSON', `${exportHeader}{${line}${exportFooter(checkpoint)}`, 2],
  ['an unknown field', exportHeader + line.replace('{', '{"x":1,') + exportFooter(checkpoint), 2],
  ['an empty line', `${exportHeader}\n${line}${exportFooter(checkpoint)}`, 2],
])('export with %s is refused by line', (_name, content, at) => {
  const read = (): unknown => [...readExport(content).entries]
  expect(read).toThrow(ExportError)
  expect(read).toThrow(`line ${at}:`)
})
