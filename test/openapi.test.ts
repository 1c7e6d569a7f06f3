import { readFileSync } from 'node:fs'
import { expect, test } from 'vitest'
import { operations } from '@fleetkey/protocol/admin.ts'
import { openApi } from '@fleetkey/server/api/openapi.ts'

test('docs/openapi.json is what the server serves', () =>
  expect(JSON.parse(readFileSync(new URL('../docs/openapi.json', import.meta.url), 'utf8'))).toEqual(JSON.parse(JSON.stringify(openApi()))))

test('every operation has a summary, a bounded body and an answer', () => {
  for (const [name, { summary, response }] of Object.entries(operations)) {
    expect(summary.length, name).toBeGreaterThan(3)
    expect(response, name).toBeDefined()
  }
})
