import { readdirSync, readFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { reasonOf, reasons } from '@fleetkey/server/attestation/reasons.ts'
import { reasonsMarkdown } from '@fleetkey/server/attestation/reasons-table.ts'

const docs = readFileSync(new URL('../docs/attestation.md', import.meta.url), 'utf8')

test('docs/attestation.md has the table of reasons as the code has it', () => {
  const [, table = ''] = docs.split('<!-- reasons -->\n')
  expect(table.trim()).toBe(reasonsMarkdown())
})

test('every reason says meaning, attack and remedy', () => {
  for (const [code, { meaning, attack, remedy }] of Object.entries(reasons))
    for (const text of [meaning, attack, remedy]) expect(text.length, code).toBeGreaterThan(5)
})

test('every case of the list has a reason, but what the device itself refuses', () => {
  const answered = new Set(Object.values(reasons).flatMap(({ cases }) => [...cases]))
  // 49 and 53: a TPM refuses the blob or the approval, in the device.
  expect(Array.from({ length: 53 }, (_, at) => at + 1).filter((number) => !answered.has(number))).toEqual([49, 53])
})

test('every attestation-failed of the server has a reason of the table', () => {
  const folders = ['../server/attestation', '../server/flows']
  const sources = folders.flatMap((folder) =>
    readdirSync(new URL(folder, import.meta.url))
      .filter((name) => name.endsWith('.ts') && !name.endsWith('.test.ts'))
      .map((name) => readFileSync(new URL(`${folder}/${name}`, import.meta.url), 'utf8')),
  )
  const codes = sources.flatMap((source) => [...source.matchAll(/attestation-failed'[^\n]*(?:\n[^\n]*)?reason: '([a-z.-]+)'/g)].map(([, code = '']) => code))
  expect(codes.filter((code) => reasonOf(code) === undefined)).toEqual([])
})
