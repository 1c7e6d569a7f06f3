import { generateKeyPairSync, sign } from 'node:crypto'
import { expect, test } from 'vitest'
import { emptyLog, extend } from '@fleetkey/server/audit/chain.ts'
import { checkpointText, signedCheckpoint } from '@fleetkey/server/audit/checkpoint.ts'
import { exportFooter, exportHeader, exportLine } from '@fleetkey/server/audit/export.ts'
import { rootOf } from '@fleetkey/server/audit/tree.ts'
import { verifyExport } from './audit.ts'

const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
const spki = new Uint8Array(publicKey.export({ type: 'spki', format: 'der' }))
const entry = { at: 1, caller: 'operator:alice', from: 'test', action: 'device.show', subject: 'd1', outcome: 'done', code: null, detail: '' } as const
const first = extend(emptyLog, entry)
const second = extend(first.head, { ...entry, subject: 'd2' })
const head = { origin: 'fleetkey/plant', size: 2, root: rootOf(second.head.tree) }
const note = signedCheckpoint(head, { spki, signature: sign('sha256', Buffer.from(checkpointText(head)), privateKey) })
const content = exportHeader + exportLine(first.sequenced) + exportLine(second.sequenced) + exportFooter(note)

test.each([
  ['untouched', content, { ok: true, entries: 2, sequence: null }],
  ['edited', content.replace('"d2"', '"d3"'), { ok: false, sequence: 2 }],
  ['cut off', content.slice(0, content.lastIndexOf('{')), { ok: false }],
  ['a broken line', content.replace('"subject":"d1"', '"subject":d1'), { ok: false, sequence: 1 }],
  ['empty', '', { ok: false, sequence: null }],
])('%s', (_name, given, want) => {
  expect(verifyExport(given, spki, [note])).toMatchObject(want)
})
