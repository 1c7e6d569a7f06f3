import { readFileSync, rmSync } from 'node:fs'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { createClient, type Client } from '@fleetkey/cli/client.ts'
import { fleetkey } from './command-line.ts'
import { p256 } from './enrolled-device.ts'
import { openWorld, type World } from './world.ts'

let world: World
const clients: Client[] = []
const connection = () => JSON.parse(readFileSync(world.server.cliFile, 'utf8')) as { server: string; ca: string; token: string }
const as = (token: string): Client => {
  const client = createClient({ ...connection(), token })
  clients.push(client)
  return client
}
const add = async (id: string, role: 'owner' | 'auditor' | 'operator'): Promise<Client> =>
  as((await world.client.call('operator.add', { body: { id, roles: [role] } })).token)
const here = async (...words: string[]) => await fleetkey([...words, '--data', `${world.folder}/server`])

beforeAll(async () => void (world = await openWorld()), 60_000)
afterAll(async () => {
  for (const client of clients) client.close()
  await world.stop()
})

describe('an operator who is removed', () => {
  test('is refused at once, over a connection that is open too, and is in the list no more', async () => {
    const bob = await add('bob', 'operator')
    await bob.call('group.create', { body: { id: 'plant' } })
    expect((await here('operator', 'list')).stdout).toMatch(/bob +operator /)
    expect(await here('operator', 'remove', 'bob')).toMatchObject({ code: 0, stdout: 'operator bob removed\n' })
    await expect(bob.call('group.create', { body: { id: 'other' } })).rejects.toMatchObject({ code: 'unauthenticated' })
    expect((await world.client.call('operator.list')).items.map(({ id, roles }) => [id, ...roles])).toEqual([['owner', 'owner']])
    expect((await here('audit', 'list')).stdout).toMatch(/operator:owner +operator\.remove +bob +done/)
    expect(await here('operator', 'remove', 'bob')).toMatchObject({ code: 3, stderr: expect.stringContaining('no operator bob') })
  })

  test('leaves nothing approved, and nothing asked for, to whoever has the name next', async () => {
    const split = { shares: 3, threshold: 2, only: false, reason: 'keepers', recipient: Buffer.from(p256().point).toString('base64') }
    const [first, second] = [await add('eve', 'owner'), await add('ada', 'owner')]
    const pending = async () => (await world.client.call('approval.list')).items.filter(({ state }) => state === 'waiting' || state === 'granted')
    await world.client.call('seal.split', { body: split })
    const [asked] = await pending()
    await first.call('approval.grant', { params: { id: asked?.id ?? '' } })
    await first.call('seal.split', { body: { ...split, shares: 5 } })
    expect(new Set((await pending()).map(({ askedBy, grantedBy }) => `${askedBy}, granted by ${String(grantedBy)}`))).toEqual(
      new Set(['eve, granted by null', 'owner, granted by eve']),
    )
    await second.call('operator.remove', { params: { id: 'eve' } })
    expect((await pending()).map(({ askedBy, grantedBy }) => [askedBy, grantedBy])).toEqual([['owner', null]])
    const next = await add('eve', 'owner')
    // Once more asked, not done.
    expect(await next.call('seal.split', { body: { ...split, shares: 5 } })).toMatchObject({ approval: expect.any(String) })
    await next.call('approval.grant', { params: { id: asked?.id ?? '' } })
    expect((await pending()).find(({ id }) => id === asked?.id)).toMatchObject({ grantedBy: 'eve' })
  })

  test('is removed by an owner alone; the first one by who has the data folder', async () => {
    const auditor = await add('kim', 'auditor')
    expect((await auditor.call('operator.list')).items.length).toBeGreaterThan(1)
    for (const id of ['kim', 'ada', 'owner']) await expect(auditor.call('operator.remove', { params: { id } })).rejects.toMatchObject({ code: 'forbidden' })
    await expect(world.client.call('operator.remove', { params: { id: 'owner' } })).rejects.toMatchObject({ code: 'conflict' })
    const stolen = as(connection().token)
    rmSync(world.server.cliFile)
    await world.restart()
    await expect(stolen.call('operator.list')).rejects.toMatchObject({ code: expect.stringMatching(/unauthenticated/) })
    expect((await as(connection().token).call('operator.list')).items.map(({ id }) => id)).toEqual(['ada', 'eve', 'kim', 'owner'])
  })
})
